// Stands in for kernels that TORCHEXT_ARCHS left out of the build: tables without rows. Each is
// weak: the linker takes that of the .cu file if there is one.
#include "params.h"

namespace torchext::sm90 {

#define TORCHEXT_ABSENT(G, KIND) \
  extern const KernelTable kernels_##G##_##KIND __attribute__((weak)) = {nullptr, 0};
TORCHEXT_SM90_FILES(TORCHEXT_ABSENT)
#undef TORCHEXT_ABSENT

}  // namespace torchext::sm90
