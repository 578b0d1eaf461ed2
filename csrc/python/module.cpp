// squish_nf4._C: what Python asks the native side. Linked to the op library, so that importing it registers the ops.
#include <pybind11/pybind11.h>
#if __has_include(<torch/headeronly/version.h>)
#include <torch/headeronly/version.h>
#else
#include <torch/csrc/api/include/torch/version.h>
#endif

#include "csrc/cpu/dispatch.h"
#include "csrc/nf4/codebook.h"

namespace py = pybind11;
using namespace squish;

#define SQUISH_STRING_OF(x) #x
#define SQUISH_STRING(x) SQUISH_STRING_OF(x)

namespace {

template <typename Floats>
py::tuple as_tuple(const Floats& floats) {
  py::tuple result(floats.size());
  for (size_t i = 0; i < floats.size(); ++i) result[i] = static_cast<double>(floats[i]);
  return result;
}

std::string cpu_isa() {
  const cpu::Selection& selection = cpu::selection();
  if (!selection.error.empty()) throw py::value_error(selection.error);
  return selection.path->name;
}

py::tuple cpu_isas(bool available) {
  py::list names;
  for (const cpu::Path& path : cpu::paths())
    if (!available || cpu::is_available(path)) names.append(path.name);
  return py::tuple(names);
}

py::tuple cpu_features(const std::string& isa) {
  for (const cpu::Path& path : cpu::paths()) {
    if (isa != path.name) continue;
    py::list names;
    for (const cpu::Feature& feature : path.needs) names.append(feature.name);
    return py::tuple(names);
  }
  throw py::value_error("isa must be " + cpu::path_names() + ", got '" + isa + "'");
}

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["torch"] = TORCH_VERSION;
#if defined(SQUISH_CUDA_VERSION)
  info["cuda"] = SQUISH_STRING(SQUISH_CUDA_VERSION);
#else
  info["cuda"] = py::none();
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The native side of squish_nf4: the codebook, the CPU path in use, and how the library was built.";
  m.def("codebook", [] { return as_tuple(nf4::kLevels); }, "The 16 levels, as floats that are exact in float32.");
  m.def(
      "boundaries", [] { return as_tuple(nf4::kBoundaries); },
      "The 15 boundaries: a quotient has as many of them below it as its level's index says.");
  m.def("cpu_isa", &cpu_isa,
        "The CPU path of this process, one of cpu_isas(). Raises ValueError if SQUISH_NF4_ISA names something unknown "
        "or missing.");
  m.def("cpu_isas", &cpu_isas, py::arg("available") = false,
        "The names of the CPU paths that SQUISH_NF4_ISA takes. Those of one architecture ascend. available: only those "
        "that this CPU has, up to the one of this process.");
  m.def("cpu_features", &cpu_features, py::arg("isa"),
        "What a CPU path needs, as /proc/cpuinfo calls it; nothing for a path of another architecture.");
  m.def("build_info", &build_info, "A dict: compiler, torch and cuda (None for a CPU build).");
}
