// What the functions of nf4.h say to at::Tensor(): one line for each call, with the type of the error.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <squish_nf4/nf4.h>

#include <functional>
#include <iostream>

void report(const std::function<void()>& call) {
  try {
    call();
    std::cout << "no error\n";
  } catch (const c10::ValueError& error) {
    std::cout << "ValueError: " << error.what_without_backtrace() << "\n";
  } catch (const c10::Error& error) {
    std::cout << "Error: " << error.what_without_backtrace() << "\n";
  }
}

int main() {
  at::Tensor undefined;
  const auto [packed, scales] = squish::quantize_nf4(at::ones({4, 64}));
  report([&] { squish::quantize_nf4(undefined); });
  report([&] { squish::dequantize_nf4(undefined, scales); });
  report([&] { squish::dequantize_nf4(packed, undefined); });
  report([&] { squish::dequantize_nf4_out(undefined, packed, scales); });
  report([&] { squish::dequantize_nf4_out(undefined, undefined, undefined); });

  const auto by_name = c10::Dispatcher::singleton()
                           .findSchemaOrThrow("squish::linear_nf4", "")
                           .typed<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                             const std::optional<at::Tensor>&, int64_t)>();
  for (const auto dtype : {at::kFloat, at::kBFloat16, at::kHalf}) {
    for (const int64_t rows : {1, 100}) {  // in one sweep, and in tiles
      const at::Tensor x = at::ones({rows, 64}, dtype).requires_grad_();
      report([&] { squish::linear_nf4(undefined, packed, scales); });
      report([&] { squish::linear_nf4(x, undefined, scales); });
      report([&] { by_name.call(x, packed, undefined, std::nullopt, 32); });
      report([&] {
        const at::Tensor y = squish::linear_nf4(x, packed, scales, undefined);
        TORCH_CHECK(at::equal(y, squish::linear_nf4(x, packed, scales)), "an undefined bias changed the result");
        TORCH_CHECK(at::equal(y, by_name.call(x, packed, scales, undefined, 32)), "by name it is another result");
        y.sum().backward();
        TORCH_CHECK(at::equal(x.grad(), at::full_like(x, 4)), "the gradient is another one");
      });
    }
  }
}
