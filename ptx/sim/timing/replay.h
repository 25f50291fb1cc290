// The clock: replays the traces of a launch, without data, on one GPU's shared resources.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "../machine/launch.h"
#include "trace.h"

namespace torchext::sim::timing {

struct Gpu {
  const char* name;
  int capability;
  std::uint32_t sms;
  double gigabytes_per_second, l2_megabytes, fp8_mhz, tensor_mhz, other_mhz;
  const char* source;
};
const std::vector<Gpu>& gpus();
const Gpu* find_gpu(const std::string& name);

// What all GPUs of the table have in common (csrc/runtime/timing.inc).
struct Constants {
#define TORCHEXT_TIME(name, value, unit, fitted, grade, source) double name = value;
#include "csrc/runtime/timing.inc"
};
struct ConstantRow {
  const char* name;
  double value;
  const char* unit;
  bool fitted;
  char grade;
  const char* source;
};
const std::vector<ConstantRow>& constant_rows();

// What a warp of a role does with its time, in shares of it.
struct RoleWait {
  std::string role, reason;
  double share;
  std::uint32_t ptx_line;  // where it waits the longest
};

struct Remark {  // something that costs time, with its place
  std::string kind;
  std::string text;
  double cycles;  // that it costs an SM
  std::uint32_t ptx_line;
};

struct Interval {
  std::uint32_t track, name;
  double begin, end;  // cycles
};

struct Prediction {
  std::string gpu;
  double cycles = 0, microseconds = 0, launch_microseconds = 0, error = 0, mhz = 0;
  double waves = 0, tail = 0;  // tail: share of the SMs' time without work
  std::uint32_t ctas_per_sm = 0, sms = 0, traced_ctas = 0;
  double dram_bytes = 0, l2_bytes = 0;
  std::map<std::string, double> utilization;
  std::vector<RoleWait> waits;
  std::vector<Remark> remarks;
  std::vector<std::string> tracks, names;
  std::vector<Interval> intervals;
};

struct LaunchShapeOf {  // what the replay must know of the launch
  std::uint64_t clusters = 1;
  std::uint32_t cluster_size = 1, threads = 0, shared_bytes = 0, registers_per_thread = 0;
  std::vector<std::uint64_t> buffer_bytes;
};

// What a thread asks of the launches that it makes while an Asking exists.
struct Request {
  std::string gpu;
  // Runs only the clusters whose traces are needed, and no products: outputs are not valid.
  bool only = false;
  std::shared_ptr<const Prediction> result;
};
Request* request();  // of this thread; nullptr if it asks for nothing
class Asking {
 public:
  explicit Asking(Request* request);  // nullptr: for nothing
  ~Asking();
  Asking(const Asking&) = delete;
  Asking& operator=(const Asking&) = delete;
};

// Throws std::runtime_error if the traces cannot be replayed.
Prediction predict(const Gpu& gpu, const Program& program, const LaunchShapeOf& launch,
                   const std::vector<std::unique_ptr<ClusterTrace>>& traces);

}  // namespace torchext::sim::timing
