// Bindings only: addresses, sizes and options in, nothing out. The Python side owns every buffer and has checked it.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <tuple>

#include "contrastive.h"
#include "cpu/instruction_set.h"
#include "sinkhorn.h"

namespace py = pybind11;
using namespace seer;

namespace {

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

template <class T>
void bind_operands(py::module_& m, const std::string& type) {
  py::class_<Operands<T>>(m, ("Operands_" + type).c_str())
      .def(py::init([](int64_t P, int64_t N, int64_t M, std::uintptr_t query_scale, std::uintptr_t key_scale,
                       std::uintptr_t temperature, std::uintptr_t bias, std::uintptr_t query_labels,
                       std::uintptr_t key_labels, std::uintptr_t weights, bool shared_weights, int64_t own_shift,
                       bool self_contrast, int same_label) {
             return Operands<T>{P,
                                N,
                                M,
                                pointer<const T>(query_scale),
                                pointer<const T>(key_scale),
                                pointer<const T>(temperature),
                                pointer<const T>(bias),
                                pointer<const int32_t>(query_labels),
                                pointer<const int32_t>(key_labels),
                                pointer<const T>(weights),
                                shared_weights,
                                own_shift,
                                self_contrast,
                                static_cast<SameLabel>(same_label)};
           }),
           py::kw_only(), py::arg("P"), py::arg("N"), py::arg("M"), py::arg("query_scale"), py::arg("key_scale"),
           py::arg("temperature"), py::arg("bias"), py::arg("query_labels"), py::arg("key_labels"), py::arg("weights"),
           py::arg("shared_weights"), py::arg("own_shift"), py::arg("self_contrast"), py::arg("same_label"));
}

// Binds the kernels that CPU and CUDA share under `suffix`. Their last arguments, of types Where and named `where`, say
// where they run.
template <class T, class... Where, class... Names>
void bind_rows(py::module_& m, const std::string& suffix, void (*contrastive_rows)(const RowBlock<T>&, Where...),
               void (*project_rows)(T*, const T*, const T*, int64_t, int64_t, Where...), const Names&... where) {
  m.def(
      ("contrastive_rows_" + suffix).c_str(),
      [contrastive_rows](const Operands<T>& operands, std::uintptr_t products, int64_t first_problem,
                         int64_t problem_count, int64_t first_row, int64_t row_count, std::uintptr_t row_gradient,
                         bool write_gradient, std::uintptr_t rows, Where... place) {
        contrastive_rows({operands, pointer<T>(products), first_problem, problem_count, first_row, row_count,
                          pointer<const T>(row_gradient), write_gradient, pointer<T>(rows)},
                         place...);
      },
      py::arg("operands"), py::kw_only(), py::arg("products"), py::arg("first_problem"), py::arg("problem_count"),
      py::arg("first_row"), py::arg("row_count"), py::arg("row_gradient"), py::arg("write_gradient"), py::arg("rows"),
      py::arg(where)..., py::call_guard<py::gil_scoped_release>());
  m.def(
      ("project_rows_" + suffix).c_str(),
      [project_rows](std::uintptr_t gradient, std::uintptr_t x, std::uintptr_t inverse_norm, int64_t rows, int64_t D,
                     Where... place) {
        project_rows(pointer<T>(gradient), pointer<const T>(x), pointer<const T>(inverse_norm), rows, D, place...);
      },
      py::kw_only(), py::arg("gradient"), py::arg("x"), py::arg("inverse_norm"), py::arg("rows"), py::arg("D"),
      py::arg(where)..., py::call_guard<py::gil_scoped_release>());
}

// Addresses, split and rows: a bare tuple, as making an object of our own would cost more than a small loss does.
using Rows = std::tuple<std::uintptr_t, std::uintptr_t, int64_t, int64_t>;

RowSet row_set(const Rows& rows) {
  return {pointer<void>(std::get<0>(rows)), pointer<void>(std::get<1>(rows)), std::get<2>(rows), std::get<3>(rows)};
}

// Binds the losses of few rows that CPU and CUDA share under `suffix`; the last arguments say where they run, as above.
template <class T, class... Where, class... Names>
void bind_fused(py::module_& m, const std::string& suffix, void (*fused_loss)(const FusedLoss<T>&, Where...),
                void (*fused_gradients)(const FusedGradients<T>&, Where...), const Names&... where) {
  m.def(
      ("fused_loss_" + suffix).c_str(),
      [fused_loss](const Operands<T>& operands, const Rows& query, const Rows& key, int64_t D, int feature_type, int form,
                   bool normalize, T temperature_value, T bias_value, std::uintptr_t row_gradient,
                   std::uintptr_t scratch, std::uintptr_t rows, std::uintptr_t slopes, std::uintptr_t along,
                   std::uintptr_t total_loss, std::uintptr_t total_weight, std::uintptr_t mean_loss,
                   std::uintptr_t temperature_gradient, std::uintptr_t bias_gradient, bool write_slopes,
                   Where... place) {
        fused_loss({operands, row_set(query), row_set(key), D, static_cast<FeatureType>(feature_type), static_cast<Form>(form),
                    normalize, temperature_value, bias_value, pointer<const T>(row_gradient), pointer<T>(scratch),
                    pointer<T>(rows), pointer<T>(slopes), pointer<T>(along), pointer<T>(total_loss),
                    pointer<T>(total_weight), pointer<T>(mean_loss), pointer<T>(temperature_gradient),
                    pointer<T>(bias_gradient), write_slopes},
                   place...);
      },
      py::arg("operands"), py::kw_only(), py::arg("query"), py::arg("key"), py::arg("D"), py::arg("feature_type"),
      py::arg("form"), py::arg("normalize"), py::arg("temperature_value"), py::arg("bias_value"),
      py::arg("row_gradient"), py::arg("scratch"), py::arg("rows"), py::arg("slopes"), py::arg("along"),
      py::arg("total_loss"), py::arg("total_weight"), py::arg("mean_loss"), py::arg("temperature_gradient"),
      py::arg("bias_gradient"), py::arg("write_slopes"), py::arg(where)...,
      py::call_guard<py::gil_scoped_release>());
  m.def(
      ("fused_gradients_" + suffix).c_str(),
      [fused_gradients](int64_t P, int64_t D, const Rows& query, const Rows& key, const Rows& query_gradient,
                        const Rows& key_gradient, int feature_type, bool self_contrast, std::uintptr_t slopes, std::uintptr_t along,
                        std::uintptr_t scale, Where... place) {
        fused_gradients({P, D, row_set(query), row_set(key), row_set(query_gradient), row_set(key_gradient), static_cast<FeatureType>(feature_type),
                         self_contrast, pointer<const T>(slopes), pointer<const T>(along), pointer<const T>(scale)},
                        place...);
      },
      py::kw_only(), py::arg("P"), py::arg("D"), py::arg("query"), py::arg("key"), py::arg("query_gradient"),
      py::arg("key_gradient"), py::arg("feature_type"), py::arg("self_contrast"), py::arg("slopes"), py::arg("along"),
      py::arg("scale"), py::arg(where)..., py::call_guard<py::gil_scoped_release>());
}

void bind_scratch(py::module_& m, const char* name, int64_t (*values)(int64_t, int64_t, int64_t, int64_t, bool)) {
  m.def(name, values, py::kw_only(), py::arg("P"), py::arg("N"), py::arg("M"), py::arg("D"), py::arg("self_contrast"));
}

template <class T>
void bind_panels(py::module_& m, const std::string& type) {
  py::class_<Panel<T>>(m, ("Panel_" + type).c_str())
      .def(py::init([](const Operands<T>& operands, std::uintptr_t products, int64_t first_problem,
                       int64_t problem_count, int64_t first_row, int64_t row_count, int64_t first_column,
                       int64_t column_count) {
             return Panel<T>{operands,  pointer<T>(products), first_problem, problem_count,
                             first_row, row_count,            first_column,  column_count};
           }),
           py::arg("operands"), py::kw_only(), py::arg("products"), py::arg("first_problem"), py::arg("problem_count"),
           py::arg("first_row"), py::arg("row_count"), py::arg("first_column"), py::arg("column_count"));
  m.def(
      ("row_statistics_" + type).c_str(),
      [](const Panel<T>& panel, std::uintptr_t anchors, int threads) {
        cpu::row_statistics(panel, pointer<T>(anchors), threads);
      },
      py::arg("panel"), py::kw_only(), py::arg("anchors"), py::arg("threads"),
      py::call_guard<py::gil_scoped_release>());
  m.def(
      ("column_statistics_" + type).c_str(),
      [](const Panel<T>& panel, std::uintptr_t anchors, int64_t first, int64_t last, int threads) {
        cpu::column_statistics(panel, pointer<T>(anchors), first, last, threads);
      },
      py::arg("panel"), py::kw_only(), py::arg("anchors"), py::arg("first"), py::arg("last"), py::arg("threads"),
      py::call_guard<py::gil_scoped_release>());
  m.def(
      ("panel_gradient_" + type).c_str(),
      [](const Panel<T>& panel, std::uintptr_t row_slopes, std::uintptr_t column_slopes, int threads) {
        cpu::panel_gradient(panel, pointer<const T>(row_slopes), pointer<const T>(column_slopes), threads);
      },
      py::arg("panel"), py::kw_only(), py::arg("row_slopes"), py::arg("column_slopes"), py::arg("threads"),
      py::call_guard<py::gil_scoped_release>());
}

// Binds the solvers that CPU and CUDA share under `suffix`; the last arguments say where they run, as above.
template <class T, class... Where, class... Names>
void bind_solvers(py::module_& m, const std::string& suffix,
                  void (*solve)(const Transport<T>&, const Stopping&, const Potentials<T>&, Where...),
                  void (*gradient)(const Transport<T>&, const Potentials<T>&, const TransportGradient<T>&, Where...),
                  const Names&... where) {
  m.def(
      ("sinkhorn_solve_" + suffix).c_str(),
      [solve](const Transport<T>& transport, int64_t max_iterations, double tolerance, double above, double start,
              double factor, double until, std::uintptr_t value, std::uintptr_t transport_cost, std::uintptr_t f,
              std::uintptr_t g, std::uintptr_t scale, std::uintptr_t marginal_error, std::uintptr_t iterations,
              std::uintptr_t converged, std::uintptr_t usable, Where... place) {
        solve(transport, Stopping{max_iterations, tolerance, above, start, factor, until},
              Potentials<T>{pointer<T>(value), pointer<T>(transport_cost), pointer<T>(f), pointer<T>(g),
                            pointer<T>(scale), pointer<T>(marginal_error), pointer<int32_t>(iterations),
                            pointer<bool>(converged), pointer<bool>(usable)},
              place...);
      },
      py::arg("transport"), py::kw_only(), py::arg("max_iterations"), py::arg("tolerance"), py::arg("above"),
      py::arg("start"), py::arg("factor"), py::arg("until"), py::arg("value"), py::arg("transport_cost"), py::arg("f"),
      py::arg("g"), py::arg("scale"), py::arg("marginal_error"), py::arg("iterations"), py::arg("converged"),
      py::arg("usable"), py::arg(where)..., py::call_guard<py::gil_scoped_release>());
  m.def(
      ("sinkhorn_gradient_" + suffix).c_str(),
      [gradient](const Transport<T>& transport, std::uintptr_t f, std::uintptr_t g, std::uintptr_t scale,
                 std::uintptr_t value_gradient, std::uintptr_t transport_cost_gradient, std::uintptr_t f_gradient,
                 std::uintptr_t g_gradient, std::uintptr_t scale_gradient, std::uintptr_t cost_gradient,
                 std::uintptr_t a_gradient, std::uintptr_t b_gradient, Where... place) {
        Potentials<T> at{};
        at.f = pointer<T>(f);
        at.g = pointer<T>(g);
        at.scale = pointer<T>(scale);
        gradient(transport, at,
                 TransportGradient<T>{pointer<const T>(value_gradient), pointer<const T>(transport_cost_gradient),
                                      pointer<const T>(f_gradient), pointer<const T>(g_gradient),
                                      pointer<const T>(scale_gradient), pointer<T>(cost_gradient),
                                      pointer<T>(a_gradient), pointer<T>(b_gradient)},
                 place...);
      },
      py::arg("transport"), py::kw_only(), py::arg("f"), py::arg("g"), py::arg("scale"), py::arg("value_gradient"),
      py::arg("transport_cost_gradient"), py::arg("f_gradient"), py::arg("g_gradient"), py::arg("scale_gradient"),
      py::arg("cost_gradient"), py::arg("a_gradient"), py::arg("b_gradient"), py::arg(where)...,
      py::call_guard<py::gil_scoped_release>());
}

template <class T>
void bind_sinkhorn(py::module_& m, const std::string& type) {
  py::class_<Transport<T>>(m, ("Transport_" + type).c_str())
      .def(py::init([](int64_t B, int64_t n, int64_t m, std::uintptr_t cost, std::uintptr_t a, std::uintptr_t b,
                       std::uintptr_t eps, std::uintptr_t x_lengths, std::uintptr_t y_lengths, double tau_a,
                       double tau_b, int scale_cost) {
             return Transport<T>{B,
                                 n,
                                 m,
                                 pointer<const T>(cost),
                                 pointer<const T>(a),
                                 pointer<const T>(b),
                                 pointer<const T>(eps),
                                 pointer<const int64_t>(x_lengths),
                                 pointer<const int64_t>(y_lengths),
                                 tau_a,
                                 tau_b,
                                 static_cast<CostScale>(scale_cost)};
           }),
           py::kw_only(), py::arg("B"), py::arg("n"), py::arg("m"), py::arg("cost"), py::arg("a"), py::arg("b"),
           py::arg("eps"), py::arg("x_lengths"), py::arg("y_lengths"), py::arg("tau_a"), py::arg("tau_b"),
           py::arg("scale_cost"));
  m.def(
      ("sinkhorn_cost_" + type).c_str(),
      [](int64_t B, int64_t n, int64_t m, int64_t D, std::uintptr_t x, std::uintptr_t y, std::uintptr_t x_lengths,
         std::uintptr_t y_lengths, int ground, double cancelled, std::uintptr_t cost, int threads) {
        cpu::sinkhorn_cost(Clouds<T>{B, n, m, D, pointer<const T>(x), pointer<const T>(y),
                                     pointer<const int64_t>(x_lengths), pointer<const int64_t>(y_lengths),
                                     static_cast<Ground>(ground), static_cast<T>(cancelled), pointer<T>(cost)},
                           threads);
      },
      py::kw_only(), py::arg("B"), py::arg("n"), py::arg("m"), py::arg("D"), py::arg("x"), py::arg("y"),
      py::arg("x_lengths"), py::arg("y_lengths"), py::arg("ground"), py::arg("cancelled"), py::arg("cost"),
      py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  bind_solvers<T>(m, type, cpu::sinkhorn_solve<T>, cpu::sinkhorn_gradient<T>, "threads");
  py::class_<Alternation<T>>(m, ("Alternation_" + type).c_str())
      .def(py::init([](int64_t P, int64_t N, int64_t M, int64_t iterations, std::uintptr_t cost, std::uintptr_t log_a,
                       std::uintptr_t log_b, std::uintptr_t start, double share_a, double share_b) {
             return Alternation<T>{P, N, M, iterations, pointer<const T>(cost), pointer<const T>(log_a),
                                   pointer<const T>(log_b), pointer<const T>(start), T(share_a), T(share_b)};
           }),
           py::kw_only(), py::arg("P"), py::arg("N"), py::arg("M"), py::arg("iterations"), py::arg("cost"),
           py::arg("log_a"), py::arg("log_b"), py::arg("start"), py::arg("share_a"), py::arg("share_b"));
  m.def(
      ("alternate_" + type).c_str(),
      [](const Alternation<T>& alternation, std::uintptr_t potential, std::uintptr_t rows, std::uintptr_t columns,
         int threads) {
        cpu::alternate(alternation, pointer<T>(potential), pointer<T>(rows), pointer<T>(columns), threads);
      },
      py::arg("alternation"), py::kw_only(), py::arg("potential"), py::arg("rows"), py::arg("columns"),
      py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  m.def(
      ("alternate_gradient_" + type).c_str(),
      [](const Alternation<T>& alternation, std::uintptr_t rows, std::uintptr_t columns, std::uintptr_t gradient,
         std::uintptr_t cost_gradient, int threads) {
        cpu::alternate_gradient(alternation, pointer<const T>(rows), pointer<const T>(columns),
                                pointer<const T>(gradient), pointer<T>(cost_gradient), threads);
      },
      py::arg("alternation"), py::kw_only(), py::arg("rows"), py::arg("columns"), py::arg("gradient"),
      py::arg("cost_gradient"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
}

#if defined(SEER_CUDA_ARCHITECTURES)
template <class T>
void bind_cuda_sinkhorn(py::module_& m, const std::string& type) {
  bind_solvers<T>(m, "cuda_" + type, cuda::sinkhorn_solve<T>, cuda::sinkhorn_gradient<T>, "scratch", "device",
                  "stream");
  m.def(("sinkhorn_scratch_" + type).c_str(), &cuda::sinkhorn_scratch<T>, py::arg("transport"), py::kw_only(),
        py::arg("gradient"), py::arg("device"));
}
#endif

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Compiled kernels of seer_kernels. Private: call the functions of seer_kernels instead.";
  m.def("instruction_set", [] { return static_cast<int>(cpu::instruction_set()); });
  m.def("best_instruction_set", [] { return static_cast<int>(cpu::best_instruction_set()); });
  m.def("limit_instruction_set", [](int limit) { cpu::limit_instruction_set(static_cast<cpu::InstructionSet>(limit)); });
  bind_operands<float>(m, "f32");
  bind_operands<double>(m, "f64");
  bind_panels<float>(m, "f32");
  bind_panels<double>(m, "f64");
  bind_rows(m, "f32", cpu::contrastive_rows<float>, cpu::project_rows<float>, "threads");
  bind_rows(m, "f64", cpu::contrastive_rows<double>, cpu::project_rows<double>, "threads");
  bind_fused(m, "f32", cpu::fused_loss<float>, cpu::fused_gradients<float>, "threads");
  bind_fused(m, "f64", cpu::fused_loss<double>, cpu::fused_gradients<double>, "threads");
  bind_scratch(m, "fused_scratch", cpu::fused_scratch);
  bind_sinkhorn<float>(m, "f32");
  bind_sinkhorn<double>(m, "f64");
#if defined(SEER_CUDA_ARCHITECTURES)
  m.attr("cuda_architectures") = SEER_CUDA_ARCHITECTURES;
  bind_rows(m, "cuda_f32", cuda::contrastive_rows<float>, cuda::project_rows<float>, "device", "stream");
  bind_rows(m, "cuda_f64", cuda::contrastive_rows<double>, cuda::project_rows<double>, "device", "stream");
  bind_fused(m, "cuda_f32", cuda::fused_loss<float>, cuda::fused_gradients<float>, "device", "stream");
  bind_fused(m, "cuda_f64", cuda::fused_loss<double>, cuda::fused_gradients<double>, "device", "stream");
  bind_scratch(m, "fused_scratch_cuda", cuda::fused_scratch);
  bind_cuda_sinkhorn<float>(m, "f32");
  bind_cuda_sinkhorn<double>(m, "f64");
#else
  m.attr("cuda_architectures") = "";
#endif
}
