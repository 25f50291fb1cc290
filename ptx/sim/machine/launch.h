// The simulator's C++ interface: parse PTX, launch a kernel on host memory, get a report.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "../check/findings.h"

namespace torchext::sim {

struct Parameter {
  std::string name;
  std::size_t size = 0, align = 0, offset = 0;  // bytes
  std::string type;                             // of an element: "u32"
  bool is_array = false, is_pointer = false;    // is_pointer: declared with .ptr
};

struct Kernel {
  std::string name;
  std::vector<Parameter> params;
  // .maxntid, .reqntid, .reqnctapercluster; 0 where absent.
  std::uint32_t max_threads[3] = {0, 0, 0};
  std::uint32_t required_threads[3] = {0, 0, 0};
  std::uint32_t cluster[3] = {0, 0, 0};
  std::uint32_t min_ctas = 0, max_registers = 0;
  std::uint32_t line = 0;
};

struct SourceText {
  std::string name, text;
};

struct Program;
struct ParsedModule;
struct DeviceVariables;
class DeviceHeap;

// A parsed PTX file, or several linked ones. Thread-safe. The .global variables keep their values
// between launches.
class Module {
 public:
  // Throws PtxError (ir.h), which names the line.
  // Several texts are linked.
  static std::shared_ptr<Module> parse(const std::vector<SourceText>& texts);
  ~Module();

  const std::vector<Kernel>& kernels() const { return kernels_; }
  const Kernel& kernel(const std::string& name) const;  // throws std::invalid_argument
  std::string target() const;                           // "sm_90a"
  const std::vector<std::string>& files() const;        // of .file directives
  // Decodes the kernel and all it calls. Throws PtxError for an unknown opcode or modifier.
  std::shared_ptr<const Program> program(const std::string& kernel) const;
  DeviceVariables& variables() const { return *variables_; }
  DeviceHeap& heap() const { return *heap_; }

 private:
  Module() = default;
  struct Cache;
  std::unique_ptr<ParsedModule> parsed_;
  std::unique_ptr<DeviceVariables> variables_;
  std::unique_ptr<DeviceHeap> heap_;
  std::unique_ptr<Cache> cache_;
  std::vector<Kernel> kernels_;
};

struct Dim3 {
  std::uint32_t x = 1, y = 1, z = 1;
  std::uint64_t volume() const { return std::uint64_t{x} * y * z; }
};

// Memory that a kernel may access. Global addresses are host addresses. An access outside every
// buffer is out of bounds. The bytes of a Write buffer start as unwritten.
struct Buffer {
  enum Access { Read, Write, ReadWrite };
  void* data = nullptr;
  std::size_t bytes = 0;
  Access access = ReadWrite;
  std::string name;
  int device = -1;  // that it belongs to, in a group of GPUs
};

struct LaunchOptions {
  Dim3 grid, block;
  Dim3 cluster{0, 0, 0};              // 0: the kernel's own, or 1
  bool non_portable_cluster = false;  // allows more than 8 CTAs
  std::uint32_t dynamic_smem = 0;
  std::uint64_t seed = 0;
  // When asynchronous work completes: at once, not before something waits for it, or at random.
  enum Completion { Eager, Late, Random } completion = Late;
  // converged: an .aligned or .sync instruction orders the lanes of its warp.
  // strict: only bar.warp.sync and barriers do.
  enum LaneOrder { converged, strict } lane_order = converged;
  bool checks = true;        // false: only errors that stop the kernel (out of bounds, deadlock)
  unsigned num_threads = 0;  // host threads; 0: all cores. 1 makes racing CTAs reproducible
  std::uint64_t max_instructions = 20'000'000'000;  // warp-instructions, all CTAs together
  std::uint32_t num_sms = 132;
  int compute_capability = 0;  // of the simulated GPU, 90 for sm_90; 0: the module's target
  std::uint32_t registers_per_thread = 0;  // for setmaxnreg's pool; 0: from the launch bounds
  std::uint32_t max_findings = 32;         // of each grade
};

// The bytes of a parameter, as many as the kernel declares.
using ParamBytes = std::vector<std::uint8_t>;

struct Report {
  std::vector<Finding> findings;
  std::map<std::string, std::uint64_t> instructions;  // warp-instructions by opcode
  std::uint64_t warp_instructions = 0;
  double seconds = 0;
  std::string output;  // printf
  struct Unwritten {
    std::string buffer;
    std::uint64_t bytes, first_offset;
  };
  std::vector<Unwritten> unwritten;  // Write buffers with bytes that nothing wrote
  bool findings_truncated = false;
  std::size_t count(Grade grade) const;
  bool ok() const { return count(Grade::error) == 0; }
};

// Throws std::invalid_argument for a launch that CUDA would refuse, PtxError for PTX that the
// simulator does not know.
Report launch(const Module& module, const std::string& kernel, const LaunchOptions& options,
              const std::vector<ParamBytes>& params, const std::vector<Buffer>& buffers);

// A grid of a group.
struct GroupMember {
  const Module* module;
  std::string kernel;
  LaunchOptions options;
  std::vector<ParamBytes> params;
  int device;
};
// The most GPUs of a group: the numbers of clusters have four bits for them (check/clock.h).
constexpr std::size_t kMostGpus = 16;

// Runs one grid a GPU, all at the same time, on memory that all of them may access. Returns their
// reports, in the order of `members`. The first member's options hold for all, except for those that
// describe its grid. Throws like launch.
std::vector<Report> launch_group(const std::vector<GroupMember>& members,
                                 const std::vector<Buffer>& buffers);

}  // namespace torchext::sim
