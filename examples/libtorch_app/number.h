// Numbers of a command line.
#pragma once

#include <charconv>
#include <cstdint>
#include <stdexcept>
#include <string>

inline int64_t read_number(const std::string& name, const std::string& text) {
  int64_t number = 0;
  const char* last = text.data() + text.size();
  const auto [end, error] = std::from_chars(text.data(), last, number);
  if (error != std::errc() || end != last)
    throw std::runtime_error(name + " must be a whole number of at most 64 bits, got '" + text + "'");
  return number;
}
