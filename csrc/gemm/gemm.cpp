// Host entry of fp8_gemm_nt.
#include "gemm.h"

#include "../runtime/layout.h"
#include "operands.h"

namespace torchext {
namespace {

constexpr const char* kOp = "fp8_gemm_nt";

std::vector<int64_t> out_sizes(const Tensor& a, const GemmProblem& p) {
  std::vector<int64_t> sizes = sizes_of(a);
  sizes.back() = p.n;
  return sizes;
}

}  // namespace

Tensor fp8_gemm_nt(const Tensor& a, const Tensor& a_scale, const Tensor& b, const Tensor& b_scale,
                   std::optional<Tensor> bias, std::optional<ScalarType> out_dtype,
                   int64_t num_sms) {
  const GemmCall call{kOp, a, a_scale, b, b_scale, bias, num_sms};
  GemmProblem p = check_operands(call, Grouping::kNone);
  const ScalarType dtype = check_out_dtype(call, out_dtype);
  const Tensor out = empty_out(call, p, out_sizes(a, p), dtype);
  run(call, p, out);
  return out;
}

void fp8_gemm_nt_out(const Tensor& a, const Tensor& a_scale, const Tensor& b, const Tensor& b_scale,
                     Tensor out, bool accumulate, std::optional<Tensor> bias, int64_t num_sms) {
  const GemmCall call{kOp, a, a_scale, b, b_scale, bias, num_sms};
  GemmProblem p = check_operands(call, Grouping::kNone);
  check_out(call, p, out, accumulate, out_sizes(a, p),
            "a's shape " + shape_string(a) + " with N = " + std::to_string(p.n) + " in place of K");
  run(call, p, out);
}

}  // namespace torchext
