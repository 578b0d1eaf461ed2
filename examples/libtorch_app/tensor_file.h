// Tensors in files that torch.save wrote in Python, and that torch.load reads there.
#pragma once

#include <torch/serialize.h>

#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

inline void require_file(const std::string& path) {
  if (!std::ifstream(path)) throw std::runtime_error("cannot read " + path);
}

inline torch::IValue read_value(const std::string& path) {
  require_file(path);
  std::ifstream file(path, std::ios::binary);
  return torch::pickle_load({std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()});
}

// What a model is called with: a tuple is spread over the arguments, anything else is the only one.
inline std::vector<torch::IValue> read_arguments(const std::string& path) {
  const torch::IValue value = read_value(path);
  return value.isTuple() ? value.toTupleRef().elements().vec() : std::vector<torch::IValue>{value};
}

inline void write_value(const std::string& path, const torch::IValue& value) {
  const std::vector<char> bytes = torch::pickle_save(value);
  std::ofstream file(path, std::ios::binary);
  if (!file.write(bytes.data(), static_cast<std::streamsize>(bytes.size())))
    throw std::runtime_error("cannot write " + path);
}
