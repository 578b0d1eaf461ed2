// squish_nf4._C: what Python asks the native side. Linked to the op library, so that importing it registers the ops.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <vector>

#include "csrc/cpu/dispatch.h"
#include "csrc/nf4/codebook.h"

namespace py = pybind11;
using namespace squish;

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

using Bytes = py::array_t<uint8_t, py::array::c_style>;

Bytes unpack_indices(const Bytes& packed) {
  std::vector<py::ssize_t> shape(packed.shape(), packed.shape() + packed.ndim());
  shape.push_back(2);
  Bytes indices(shape);
  const uint8_t* byte = packed.data();
  uint8_t* index = indices.mutable_data();
  const py::ssize_t count = packed.size();
  {
    const py::gil_scoped_release others_may_run;
    for (py::ssize_t i = 0; i < count; ++i) {
      index[2 * i] = static_cast<uint8_t>(nf4::even_index(byte[i]));
      index[2 * i + 1] = static_cast<uint8_t>(nf4::odd_index(byte[i]));
    }
  }
  return indices;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The native side of squish_nf4: the codebook, the bytes, and the CPU paths.";
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
  m.def("unpack_indices", &unpack_indices, py::arg("packed"),
        "The indices of levels that packed bytes hold, as uint8: one more dimension of two, the even column first. So "
        "packed rows (n, d/2) become (n, d/2, 2), in memory as (n, d) would be.");
}
