// Runs a model that AOTInductor compiled: torch._inductor.aoti_compile_and_package wrote the .pt2 file.
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <iostream>
#include <vector>

#include "tensor_file.h"

int main(int argc, char** argv) {
  if (argc != 4) {
    std::cerr << "usage: aoti_app MODEL.pt2 INPUT.pt OUTPUT.pt\n";
    return 2;
  }
  try {
    const torch::InferenceMode no_gradients;
    require_file(argv[1]);
    torch::inductor::AOTIModelPackageLoader model(argv[1]);
    std::vector<at::Tensor> inputs;
    for (const torch::IValue& argument : read_arguments(argv[2])) inputs.push_back(argument.toTensor());
    write_value(argv[3], model.run(inputs)[0]);
  } catch (const std::exception& error) {
    std::cerr << "aoti_app: " << error.what() << "\n";
    return 1;
  }
}
