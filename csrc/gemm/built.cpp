// Looks which kernels were linked in.
#include "built.h"

#include "../runtime/check.h"
#include "../runtime/device.h"
#include "mma/kernels.h"
#include "sm90/params.h"

namespace torchext {
namespace {

bool linked(Path path) {
  if constexpr (kBuiltWithCuda) {
    switch (path) {
      case Path::sm90:
        return sm90::kernels_1d2d_stored.count > 0;
      case Path::sm89:
        return mma::mma89_fp8_gemm_nt_1d2d(mma::TileSize::small, false, false).function != nullptr;
      case Path::sm80:
        return mma::mma80_fp8_gemm_nt_1d2d(mma::TileSize::small, false, false).function != nullptr;
      case Path::plain:
        return mma::plain_fp8_gemm_nt().function != nullptr;
    }
  }
  return false;
}

const char* name_of(Path path) {
  for (const PathRow& row : kPaths)
    if (row.path == path) return row.name;
  return "?";
}

}  // namespace

void require_built(Path path, const char* op) {
  TORCHEXT_CHECK(linked(path), op, ": this build of torchext must have the ", name_of(path),
                 " kernels, which this GPU runs (got one whose TORCHEXT_ARCHS left them out); "
                 "reinstall torchext with TORCHEXT_ARCHS=",
                 int(path), " or without TORCHEXT_ARCHS");
}

}  // namespace torchext

bool torchext_is_path_built(int32_t path) {
  return torchext::linked(torchext::Path(path));
}
