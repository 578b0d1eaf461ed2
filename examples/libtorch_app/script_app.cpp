// Runs a TorchScript model with NF4 layers: squish_nf4.export_torchscript or squish-nf4 export wrote it.
#include <torch/script.h>

#include <algorithm>
#include <chrono>
#include <iostream>
#include <vector>

#include "number.h"
#include "tensor_file.h"

// Microseconds of one call: the median over `repeats`, after some calls that TorchScript uses to specialize itself.
double median_time(torch::jit::Module& model, const std::vector<torch::IValue>& inputs, int64_t repeats) {
  std::vector<double> times;
  for (int64_t i = -10; i < repeats; ++i) {
    const auto start = std::chrono::steady_clock::now();
    model.forward(inputs);
    const std::chrono::duration<double, std::micro> time = std::chrono::steady_clock::now() - start;
    if (i >= 0) times.push_back(time.count());
  }
  std::nth_element(times.begin(), times.begin() + repeats / 2, times.end());
  return times[repeats / 2];
}

int main(int argc, char** argv) {
  if (argc < 4 || argc > 5) {
    std::cerr << "usage: script_app MODEL.pt INPUT.pt OUTPUT.pt [REPEATS]\n";
    return 2;
  }
  try {
    const torch::InferenceMode no_gradients;
    const int64_t repeats = argc == 5 ? read_number("REPEATS", argv[4]) : 0;
    require_file(argv[1]);
    torch::jit::Module model = torch::jit::load(argv[1]);
    const std::vector<torch::IValue> inputs = read_arguments(argv[2]);
    write_value(argv[3], model.forward(inputs));
    if (repeats > 0) std::cout << median_time(model, inputs, repeats) << "\n";
  } catch (const std::exception& error) {
    std::cerr << "script_app: " << error.what() << "\n";
    return 1;
  }
}
