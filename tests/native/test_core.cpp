// The tests of csrc/nf4 and csrc/cpu that need neither torch nor Python. Built with sanitizers, and for arm64.
// Prints the paths it has tested. If SQUISH_NF4_ISA names what this CPU has not: prints the refusal, exit status 3.
#include "tests/native/support.h"

int main() {
  const squish::cpu::Selection& selection = squish::cpu::selection();
  if (!selection.error.empty()) {
    std::puts(selection.error.c_str());
    return 3;
  }
  test::check_float_bits();
  test::check_float_environment();
  test::check_encode_and_decode();
  test::check_linear();
  test::check_tiles();
  for (const test::Path& path : test::available_paths()) std::printf("%s\n", path.name);
  return 0;
}
