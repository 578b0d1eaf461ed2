// The gradients. linear_nf4 is linear in x and in bias: gradients flow to these two, never to packed or scales, and
// the backward keeps no dense weight. Each gradient is itself an operator with a gradient, so derivatives of any order
// and torch.compile see the whole graph. Nodes are written by hand: torch.func refuses torch::autograd::Function.
#include <ATen/core/VariableHooksInterface.h>
#include <ATen/ops/sum.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/library.h>

#include <functional>
#include <mutex>
#include <numeric>

#include "csrc/ops/calls.h"
#include "csrc/ops/torch_compat.h"

namespace squish::ops {
namespace {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using torch::dynamo::autograd::CompiledNodeArgs;
using torch::dynamo::autograd::IValuePacker;
using torch::dynamo::autograd::SwapSavedVariables;

// A backward as a function of what compiled autograd hands to it; everything else stands in the closure.
using Backward = std::function<variable_list(const variable_list& grads, const Tensor& packed, const Tensor& scales,
                                             const c10::SymInt& d)>;

// What both nodes keep: the packed weight itself, not a copy and never a dense one.
struct PackedWeightNode : public torch::autograd::Node {
  void save(const Tensor& packed, const Tensor& scales, int64_t size, c10::SymInt columns) {
    packed_ = SavedVariable(packed, /*is_output=*/false);
    scales_ = SavedVariable(scales, /*is_output=*/false);
    group_size = size;
    d = std::move(columns);
  }

  virtual Backward backward() const = 0;

  variable_list apply(variable_list&& grads) override {
    const auto [packed, scales] = unpack();
    return backward()(grads, packed, scales, d);
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    packed_.reset_data();
    scales_.reset_data();
  }

  void compiled_args(CompiledNodeArgs& args) const override {
    args.collect(packed_, /*is_output=*/false);
    args.collect(scales_, /*is_output=*/false);
    args.collect(d);
    args.collect(group_size);
  }

  // Compiled autograd does not run the backward but writes it into its graph, as one call that it traces through.
  variable_list apply_with_saved(const variable_list& grads, SwapSavedVariables& saved) override {
    saved.before(packed_);
    saved.before(scales_);
    saved.before(d);
    const auto [packed, scales] = unpack();
    const auto call = [backward = backward()](const variable_list& grads, const torch::autograd::ivalue_list& args) {
      return backward(grads, args[0].toTensor(), args[1].toTensor(), args[2].toSymInt());
    };
    const auto& compiler = torch::dynamo::autograd::getPyCompilerInterface();
    const std::string bound = compiler->bind_function(
        saved.get_py_compiler(), name(), call, {at::TensorType::get(), at::TensorType::get(), at::SymIntType::get()},
        /*is_custom_function=*/true);  // the name is then made unique: another graph may have another closure
    using Metadata = std::vector<std::optional<torch::autograd::InputMetadata>>;
    variable_list result = compiler->call_function(
        saved.get_py_compiler(), "apply_functional", bound, grads, {packed, scales, d},
        IValuePacker<Metadata>::pack(torch::dynamo::autograd::get_input_metadata(next_edges())));
    saved.after(packed_);
    saved.after(scales_);
    saved.after(d);
    return result;
  }

 protected:
  int64_t group_size = 0;

 private:
  std::pair<Tensor, Tensor> unpack() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return {packed_.unpack(), scales_.unpack()};
  }

  SavedVariable packed_, scales_;
  c10::SymInt d;  // the columns of x; the weight may hold more
};

// (ddx) -> ddy. The gradient of dx = dy W is ddx W^T: the linear layer itself.
struct LinearNf4GradXBackward final : public PackedWeightNode {
  std::string name() const override { return "LinearNf4GradXBackward"; }

  Backward backward() const override {
    return [group_size = group_size, wanted = task_should_compute_output(0)](
               const variable_list& grads, const Tensor& packed, const Tensor& scales, const c10::SymInt&) {
      variable_list result(1);
      if (grads[0].defined() && wanted) result[0] = call_linear(grads[0], packed, scales, std::nullopt, group_size);
      return result;
    };
  }
};

// (dy) -> dx, dbias.
struct LinearNf4Backward final : public PackedWeightNode {
  std::string name() const override { return "LinearNf4Backward"; }

  Backward backward() const override {
    return [group_size = group_size, bias_dtype = bias_dtype, to_x = task_should_compute_output(0),
            to_bias = bias_dtype && task_should_compute_output(1)](const variable_list& grads, const Tensor& packed,
                                                                   const Tensor& scales, const c10::SymInt& d) {
      variable_list result(2);
      const Tensor& dy = grads[0];
      if (!dy.defined()) return result;
      if (to_x) result[0] = call_linear_grad_x(dy, packed, scales, group_size, d);
      if (to_bias) result[1] = sum_rows(dy).to(*bias_dtype);
      return result;
    };
  }

  void compiled_args(CompiledNodeArgs& args) const override {
    PackedWeightNode::compiled_args(args);
    args.collect(bias_dtype);
  }

  static Tensor sum_rows(const Tensor& dy) {
    if (dy.dim() == 1) return dy;  // an empty list of dimensions would mean all of them
    std::vector<int64_t> leading(dy.dim() - 1);
    std::iota(leading.begin(), leading.end(), 0);
    return at::sum(dy, leading, /*keepdim=*/false, at::kFloat);
  }

  std::optional<at::ScalarType> bias_dtype;
};

void refuse_forward_mode(const char* op, bool has_tangent) {
  TORCH_CHECK_NOT_IMPLEMENTED(!has_tangent, op, ": forward-mode gradients (jvp) are not implemented; use reverse mode");
}

Tensor linear_nf4(const Tensor& x, const Tensor& packed, const Tensor& scales, const std::optional<Tensor>& bias,
                  int64_t group_size) {
  using namespace torch::autograd;
  refuse_forward_mode("linear_nf4", isFwGradDefined(x) || isFwGradDefined(bias));
  NodePtr<LinearNf4Backward> node;
  if (compute_requires_grad(x, bias)) {
    node = make_node<LinearNf4Backward>();
    node->set_next_edges(collect_next_edges(x, bias));
    // The gradient of bias needs no weight.
    if (x.requires_grad()) node->save(packed, scales, group_size, x.dim() == 0 ? c10::SymInt(0) : x.sym_size(-1));
    if (bias) node->bias_dtype = bias->scalar_type();
  }
  Tensor y;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    y = call_linear(x, packed, scales, bias, group_size);
  }
  if (node) set_history(y, node);
  return y;
}

Tensor linear_nf4_grad_x(const Tensor& dy, const Tensor& packed, const Tensor& scales, int64_t group_size,
                         c10::SymInt d) {
  using namespace torch::autograd;
  refuse_forward_mode("_linear_nf4_grad_x", isFwGradDefined(dy));
  NodePtr<LinearNf4GradXBackward> node;
  if (compute_requires_grad(dy)) {
    node = make_node<LinearNf4GradXBackward>();
    node->set_next_edges(collect_next_edges(dy));
    node->save(packed, scales, group_size, d);
  }
  Tensor dx;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    dx = call_linear_grad_x(dy, packed, scales, group_size, std::move(d));
  }
  if (node) set_history(dx, node);
  return dx;
}

Tensor& dequantize_nf4_out(const Tensor& packed, const Tensor& scales, int64_t group_size, Tensor& out) {
  TORCH_CHECK(
      !(at::GradMode::is_enabled() && out.requires_grad()),
      "dequantize_nf4: out requires grad; its gradient would be silently lost (use torch.no_grad() or detach it)");
  refuse_forward_mode("dequantize_nf4", torch::autograd::isFwGradDefined(out));
  at::AutoDispatchBelowAutograd below;
  return call_dequantize_out(packed, scales, group_size, out);
}

// Bumps out's version, so that a backward that saved the overwritten values says so instead of using the new ones.
Tensor& dequantize_nf4_out_in_place(const Tensor& packed, const Tensor& scales, int64_t group_size, Tensor& out) {
  {
    at::AutoDispatchBelowADInplaceOrView below;
    call_dequantize_out(packed, scales, group_size, out);
  }
  torch::autograd::impl::bump_version(out);
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(squish, Autograd, m) {
  m.impl("quantize_nf4", torch::CppFunction::makeFallthrough());
  m.impl("dequantize_nf4", torch::CppFunction::makeFallthrough());
  m.impl("dequantize_nf4.out", &dequantize_nf4_out);
  m.impl("_survey_nf4", torch::CppFunction::makeFallthrough());
  m.impl("linear_nf4", &linear_nf4);
  m.impl("_linear_nf4_grad_x", &linear_nf4_grad_x);
}

TORCH_LIBRARY_IMPL(squish, ADInplaceOrView, m) { m.impl("dequantize_nf4.out", &dequantize_nf4_out_in_place); }

}  // namespace squish::ops
