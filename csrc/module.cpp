// Bindings only: addresses, sizes and options in, nothing out. The Python side owns every buffer and has checked it.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "contrastive.h"
#include "cpu/instruction_set.h"

namespace py = pybind11;
using namespace seer;

namespace {

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Binds both kernels under `suffix`. Their last arguments, of types Where and named `where`, say where they run.
template <class T, class... Where, class... Names>
void bind_contrastive(py::module_& m, const std::string& suffix, void (*contrastive_rows)(const RowBlock<T>&, Where...),
                      void (*project_rows)(T*, const T*, const T*, int64_t, int64_t, Where...), const Names&... where) {
  m.def(
      ("contrastive_rows_" + suffix).c_str(),
      [contrastive_rows](std::uintptr_t products, int64_t first_problem, int64_t problem_count, int64_t first_row,
                         int64_t row_count, int64_t P, int64_t N, int64_t M, std::uintptr_t query_scale,
                         std::uintptr_t key_scale, std::uintptr_t query_labels, std::uintptr_t key_labels,
                         std::uintptr_t weights, std::uintptr_t row_gradient, std::uintptr_t temperature,
                         int same_label, bool write_gradient, std::uintptr_t rows, Where... place) {
        const RowBlock<T> block{pointer<T>(products),
                                first_problem,
                                problem_count,
                                first_row,
                                row_count,
                                P,
                                N,
                                M,
                                pointer<const T>(query_scale),
                                pointer<const T>(key_scale),
                                pointer<const int32_t>(query_labels),
                                pointer<const int32_t>(key_labels),
                                pointer<const T>(weights),
                                pointer<const T>(row_gradient),
                                pointer<const T>(temperature),
                                static_cast<SameLabel>(same_label),
                                write_gradient,
                                pointer<T>(rows)};
        contrastive_rows(block, place...);
      },
      py::kw_only(), py::arg("products"), py::arg("first_problem"), py::arg("problem_count"), py::arg("first_row"),
      py::arg("row_count"), py::arg("P"), py::arg("N"), py::arg("M"), py::arg("query_scale"), py::arg("key_scale"),
      py::arg("query_labels"), py::arg("key_labels"), py::arg("weights"), py::arg("row_gradient"),
      py::arg("temperature"), py::arg("same_label"), py::arg("write_gradient"), py::arg("rows"), py::arg(where)...,
      py::call_guard<py::gil_scoped_release>());
  m.def(
      ("project_rows_" + suffix).c_str(),
      [project_rows](std::uintptr_t gradient, std::uintptr_t x, std::uintptr_t inverse_norm, int64_t rows, int64_t D,
                     Where... place) {
        project_rows(pointer<T>(gradient), pointer<const T>(x), pointer<const T>(inverse_norm), rows, D, place...);
      },
      py::kw_only(), py::arg("gradient"), py::arg("x"), py::arg("inverse_norm"), py::arg("rows"), py::arg("D"),
      py::arg(where)..., py::call_guard<py::gil_scoped_release>());
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Compiled kernels of seer_kernels. Private: call the functions of seer_kernels instead.";
  m.def("instruction_set", [] { return static_cast<int>(cpu::instruction_set()); });
  m.def("best_instruction_set", [] { return static_cast<int>(cpu::best_instruction_set()); });
  m.def("limit_instruction_set", [](int limit) { cpu::limit_instruction_set(static_cast<cpu::InstructionSet>(limit)); });
  bind_contrastive(m, "f32", cpu::contrastive_rows<float>, cpu::project_rows<float>, "threads");
  bind_contrastive(m, "f64", cpu::contrastive_rows<double>, cpu::project_rows<double>, "threads");
#if defined(SEER_CUDA_ARCHITECTURES)
  m.attr("cuda_architectures") = SEER_CUDA_ARCHITECTURES;
  bind_contrastive(m, "cuda_f32", cuda::contrastive_rows<float>, cuda::project_rows<float>, "device", "stream");
  bind_contrastive(m, "cuda_f64", cuda::contrastive_rows<double>, cuda::project_rows<double>, "device", "stream");
#else
  m.attr("cuda_architectures") = "";
#endif
}
