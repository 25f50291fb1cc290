// OpSimulator: the C callbacks, and the search for a kernel's PTX.
#include "op_simulator.h"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "../check/rendering.h"
#include "../numerics/tensor_map.h"

namespace torchext::sim {
namespace {

// The names of the kernels, found without parsing files that may never be launched.
std::vector<std::string> entry_names(const std::string& ptx) {
  static const std::string kEntry = ".entry";
  static const char* kBlank = " \t\r\n";
  std::vector<std::string> names;
  for (auto at = ptx.find(kEntry); at != std::string::npos; at = ptx.find(kEntry, at)) {
    at = ptx.find_first_not_of(kBlank, at + kEntry.size());
    if (at == std::string::npos) break;
    const auto end = ptx.find_first_of(" \t\r\n(", at);
    names.push_back(ptx.substr(at, end == std::string::npos ? end : end - at));
  }
  return names;
}

// An op may pass a range twice, for an in-place update. Ranges that overlap are merged, with the
// access of both.
std::vector<Buffer> merged(std::vector<Buffer> buffers) {
  std::sort(buffers.begin(), buffers.end(),
            [](const Buffer& a, const Buffer& b) { return a.data < b.data; });
  std::vector<Buffer> apart;
  for (const Buffer& b : buffers) {
    const auto begin = reinterpret_cast<std::uintptr_t>(b.data);
    const auto last = apart.empty() ? 0 : reinterpret_cast<std::uintptr_t>(apart.back().data);
    if (apart.empty() || last + apart.back().bytes <= begin) {
      apart.push_back(b);
      continue;
    }
    Buffer& a = apart.back();
    a.bytes = std::max(a.bytes, static_cast<std::size_t>(begin - last + b.bytes));
    if (a.access != b.access) a.access = Buffer::ReadWrite;
    if (a.name != b.name) a.name += " and " + b.name;
  }
  return apart;
}

template <class F>
int guarded(char* error, std::size_t error_bytes, F&& f) {
  std::string message;
  try {
    message = f();
    if (message.empty()) return 0;
  } catch (const std::exception& e) {
    message = e.what();
  }
  if (error_bytes != 0) {
    const std::size_t length = std::min(message.size(), error_bytes - 1);
    std::memcpy(error, message.data(), length);
    error[length] = '\0';
  }
  return 1;
}

}  // namespace

// A PTX file, parsed on first use.
struct OpSimulator::Source {
  std::vector<SourceText> texts;  // one
  std::vector<std::string> kernels;
  std::mutex mutex;
  std::shared_ptr<Module> module;

  Module& parsed() {
    const std::lock_guard<std::mutex> lock(mutex);
    if (!module) module = Module::parse(texts);
    return *module;
  }
};

// Parsed files are kept for later simulations, as long as the files do not change: reading and
// parsing the PTX of a build takes longer than many launches. Device variables keep their values,
// as on a GPU.
std::shared_ptr<OpSimulator::Source> OpSimulator::open(const std::string& path,
                                                       const ReadPtx& read_ptx) {
  using Key = std::tuple<std::string, std::filesystem::file_time_type, std::uintmax_t>;
  static std::mutex mutex;
  static std::map<Key, std::shared_ptr<Source>> kept;
  std::error_code missing;  // read_ptx reports it
  const Key key{path, std::filesystem::last_write_time(path, missing),
                std::filesystem::file_size(path, missing)};
  const std::lock_guard<std::mutex> lock(mutex);
  std::shared_ptr<Source>& source = kept[key];
  if (!source) {
    auto read = std::make_shared<Source>();
    read->texts = {{path, read_ptx(path)}};
    read->kernels = entry_names(read->texts.front().text);
    source = std::move(read);
  }
  return source;
}

OpSimulator::OpSimulator(const std::vector<std::string>& ptx_files, const ReadPtx& read_ptx,
                         LaunchOptions options, int compute_capability, timing::Request timing)
    : options_(std::move(options)),
      timing_(std::move(timing)),
      interface_{this, compute_capability, static_cast<int>(options_.num_sms), &encode_tensor_map,
                 &launch_kernel} {
  options_.compute_capability = compute_capability;
  for (const std::string& path : ptx_files) {
    sources_.push_back(open(path, read_ptx));
    for (const std::string& name : sources_.back()->kernels)
      source_by_kernel_.emplace(name, sources_.back().get());
  }
}

std::vector<OpSimulator::Launch> OpSimulator::launches() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return launches_;
}

OpSimulator::Source& OpSimulator::source_of(const std::string& kernel) {
  const auto found = source_by_kernel_.find(kernel);
  if (found == source_by_kernel_.end()) {
    throw std::runtime_error("the simulator has no PTX of kernel '" + kernel + "' among the " +
                             std::to_string(sources_.size()) +
                             " files of this build; rebuild torchext where nvcc is found");
  }
  return *found->second;
}

std::string OpSimulator::launch(const std::string& kernel, LaunchOptions options, void** arguments,
                                const std::vector<Buffer>& buffers) {
  Source& source = source_of(kernel);
  Module& module = source.parsed();
  std::vector<ParamBytes> params;
  for (const Parameter& parameter : module.kernel(kernel).params) {
    const auto* bytes = static_cast<const std::uint8_t*>(arguments[params.size()]);
    params.emplace_back(bytes, bytes + parameter.size);
  }
  timing::Request request = timing_;
  const timing::Asking asking(request.gpu.empty() ? nullptr : &request);
  Launch launch{kernel, sim::launch(module, kernel, options, params, buffers), "", &source.texts,
                nullptr};
  launch.timing = request.result;
  launch.text = render(launch.report, kernel, options, source.texts);
  const std::string findings = launch.report.ok() ? "" : launch.text;
  const std::lock_guard<std::mutex> lock(mutex_);
  launches_.push_back(std::move(launch));
  return findings;
}

int OpSimulator::encode_tensor_map(void*, void* map, const char* name, uint32_t element,
                                   uint32_t rank, const void* address, const uint64_t* dims,
                                   const uint64_t* strides_bytes, const uint32_t* box,
                                   uint32_t swizzle, char* error, size_t error_bytes) {
  return guarded(error, error_bytes, [&]() -> std::string {
    static constexpr std::uint32_t kOnes[kMaxTensorMapRank] = {1, 1, 1, 1, 1};
    try {
      sim::encode_tensor_map(map, static_cast<int>(element), rank,
                             reinterpret_cast<std::uintptr_t>(address), dims, strides_bytes, box,
                             kOnes, 0, static_cast<int>(swizzle), 0, 0);
    } catch (const TensorMapError& e) {
      return "'" + std::string(name) + "': " + e.what();
    }
    return "";
  });
}

int OpSimulator::launch_kernel(void* context, const char* kernel, const uint32_t grid[3],
                               const uint32_t block[3], const uint32_t cluster[3],
                               uint32_t shared_bytes, void** arguments,
                               const TorchextBuffer* buffers, size_t num_buffers, char* error,
                               size_t error_bytes) {
  return guarded(error, error_bytes, [&]() -> std::string {
    auto& self = *static_cast<OpSimulator*>(context);
    LaunchOptions options = self.options_;
    options.grid = Dim3{grid[0], grid[1], grid[2]};
    options.block = Dim3{block[0], block[1], block[2]};
    options.cluster = Dim3{cluster[0], cluster[1], cluster[2]};
    options.dynamic_smem = shared_bytes;
    static constexpr Buffer::Access kAccess[] = {Buffer::Read, Buffer::Write, Buffer::ReadWrite};
    std::vector<Buffer> ranges;
    for (std::size_t i = 0; i < num_buffers; ++i) {
      const TorchextBuffer& b = buffers[i];
      ranges.push_back(Buffer{const_cast<void*>(b.data), static_cast<std::size_t>(b.bytes),
                              kAccess[std::min<std::uint32_t>(b.access, 2)], b.name});
    }
    return self.launch(kernel, options, arguments, merged(std::move(ranges)));
  });
}

}  // namespace torchext::sim
