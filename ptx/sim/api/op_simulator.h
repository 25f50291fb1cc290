// Runs the kernels of an op library: finds the PTX of each kernel among the files of the build,
// launches it, and keeps the reports.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "../machine/launch.h"
#include "../timing/replay.h"
#include "op_interface.h"

namespace torchext::sim {

class OpSimulator {
 public:
  using ReadPtx = std::function<std::string(const std::string& path)>;

  // `read_ptx` returns the text of a file. `options` has the options that all launches share (seed,
  // completion, checks ...).
  OpSimulator(const std::vector<std::string>& ptx_files, const ReadPtx& read_ptx,
              LaunchOptions options, int compute_capability, timing::Request timing = {});

  // The argument of torchext_set_simulator. It is valid as long as this object.
  const TorchextSimulator* interface() const { return &interface_; }

  struct Launch {
    std::string kernel;
    Report report;
    std::string text;                    // rendered
    const std::vector<SourceText>* ptx;  // of the module; this object owns it
    std::shared_ptr<const timing::Prediction> timing;
  };
  std::vector<Launch> launches() const;

 private:
  struct Source;
  static std::shared_ptr<Source> open(const std::string& path, const ReadPtx& read_ptx);

  static int encode_tensor_map(void* context, void* map, const char* name, uint32_t element,
                               uint32_t rank, const void* address, const uint64_t* dims,
                               const uint64_t* strides_bytes, const uint32_t* box, uint32_t swizzle,
                               char* error, size_t error_bytes);
  static int launch_kernel(void* context, const char* kernel, const uint32_t grid[3],
                           const uint32_t block[3], const uint32_t cluster[3],
                           uint32_t shared_bytes, void** arguments, const TorchextBuffer* buffers,
                           size_t num_buffers, char* error, size_t error_bytes);
  Source& source_of(const std::string& kernel);
  // The rendered report if there are findings, else "".
  std::string launch(const std::string& kernel, LaunchOptions options, void** arguments,
                     const std::vector<Buffer>& buffers);

  LaunchOptions options_;
  timing::Request timing_;
  TorchextSimulator interface_;
  std::vector<std::shared_ptr<Source>> sources_;
  std::map<std::string, Source*> source_by_kernel_;
  mutable std::mutex mutex_;
  std::vector<Launch> launches_;
};

}  // namespace torchext::sim
