// Quantizes a weight in two ways, by the functions of our header and by name through torch's dispatcher, and takes a
// gradient through the packed weight.
#include <ATen/core/dispatch/Dispatcher.h>
#include <squish_nf4/nf4.h>
#include <torch/torch.h>

#include <iostream>

#include "number.h"
#include "tensor_file.h"

int main(int argc, char** argv) {
  if (argc != 4) {
    std::cerr << "usage: quantize_app WEIGHT.pt GROUP_SIZE OUTPUT.pt\n";
    return 2;
  }
  try {
    const at::Tensor weight = read_value(argv[1]).toTensor();
    const int64_t group_size = read_number("GROUP_SIZE", argv[2]);
    const auto [packed, scales] = squish::quantize_nf4(weight, group_size);

    const auto by_name = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("squish::quantize_nf4", "")
                             .typed<std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, int64_t)>();
    const auto [same_packed, same_scales] = by_name.call(weight, group_size);
    TORCH_CHECK(at::equal(packed, same_packed) && at::equal(scales, same_scales), "the two ways differ");

    const at::Tensor x = torch::ones({3, weight.size(1)}, torch::requires_grad());
    squish::linear_nf4(x, packed, scales, std::nullopt, group_size).sum().backward();

    at::Tensor decoded = at::empty_like(weight, at::kFloat, at::MemoryFormat::Contiguous);
    squish::dequantize_nf4_out(decoded, packed, scales, group_size);
    TORCH_CHECK(at::equal(decoded, squish::dequantize_nf4(packed, scales, group_size)), "the two results differ");
    write_value(argv[3], std::make_tuple(packed, scales, decoded, x.grad()));
  } catch (const c10::ValueError& error) {
    std::cerr << "quantize_app: ValueError: " << error.what_without_backtrace() << "\n";
    return 1;
  } catch (const c10::TypeError& error) {
    std::cerr << "quantize_app: TypeError: " << error.what_without_backtrace() << "\n";
    return 1;
  } catch (const std::exception& error) {
    std::cerr << "quantize_app: " << error.what() << "\n";
    return 1;
  }
}
