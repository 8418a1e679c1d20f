#include <pybind11/pybind11.h>

#include <string>

#include "host/balanced_kmeans.h"
#include "host/cpu_features.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["compiler"] = PRUNEPATH_COMPILER;
  info["cxx_standard"] = static_cast<long>(__cplusplus);
  info["build_type"] = PRUNEPATH_BUILD_TYPE;
  info["torch_headers"] = PRUNEPATH_TORCH_HEADERS;
  const std::string cuda = PRUNEPATH_CUDA_VERSION;
  info["cuda"] = cuda.empty() ? py::object(py::none()) : py::object(py::str(cuda));
  return info;
}

py::dict cpu_features() {
  py::dict features;
  for (const auto& [name, present] : prunepath::cpu_features()) {
    features[py::str(name)] = present;
  }
  return features;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "What PrunePath needs of the host in native code, without torch.";
  m.def("build_info", &build_info,
        "How the native libraries were built: compiler, cxx_standard (the value of __cplusplus), "
        "build_type, "
        "torch_headers (version of the headers built against), cuda (nvcc's version, or None "
        "without _C_cuda).");
  m.def("cpu_features", &cpu_features,
        "Instruction sets of this processor that the operating system enables, as a dict of name "
        "to bool.");
  bind_balanced_kmeans(m);
}
