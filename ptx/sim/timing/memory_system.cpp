// A curve of latency by bytes in flight, and the shares of loads that miss L2.
#include "memory_system.h"

#include <algorithm>
#include <cmath>

namespace torchext::sim::timing {

namespace {

constexpr double kTogether = 2000;  // cycles for which the SMs of a launch run in step
constexpr double kSlack = 500;      // cycles by which the SMs' requests spread

}  // namespace

void DeviceMemory::start(double rate) {
  in_flight_ = {};
  rate_ = rate;
  bytes_in_flight_ = average_in_flight_ = settled_ = free_ = bytes_ = 0;
}

// Latency and rate by one curve: with W bytes in flight on the whole GPU, a request takes
// (latency^n + (W / rate)^n)^(1/n). The SMs start together and drift apart, so the others have as
// much in flight as these SMs at first, and later as much as they had on average.
double DeviceMemory::request(double now, double bytes, double multiplicity) {
  while (!in_flight_.empty() && in_flight_.top().first <= now) {
    const auto [until, size] = in_flight_.top();
    settle(until);
    bytes_in_flight_ -= size;
    in_flight_.pop();
  }
  settle(now);
  bytes_in_flight_ += bytes * multiplicity;
  bytes_ += bytes;
  if (now < kTogether) average_in_flight_ = bytes_in_flight_;
  const double others = std::max(0.0, 1 - 1 / multiplicity);
  const double all = (1 - others) * bytes_in_flight_ + others * average_in_flight_;
  const double n = c_.dram_exponent;
  const double curve = std::pow(std::pow(c_.dram_latency, n) + std::pow(all / rate_, n), 1 / n);
  // However the SMs' requests are spread, memory has its rate: what it cannot do in kSlack waits.
  free_ = std::max(free_, now - kSlack) + bytes * multiplicity / rate_;
  const double latency = std::max(curve, free_ - now);
  in_flight_.emplace(now + latency, bytes * multiplicity);
  return latency;
}

void DeviceMemory::settle(double time) {
  if (time <= settled_) return;
  average_in_flight_ +=
      (bytes_in_flight_ - average_in_flight_) * (1 - std::exp((settled_ - time) / kTogether));
  settled_ = time;
}

// A line misses when it is first touched. If all touched lines together exceed L2, CTAs that run
// side by side still share lines: those of a square of tiles read 1/sqrt(CTAs) of what they ask for.
L2::L2(const Gpu& gpu, const LaunchShapeOf& launch,
       const std::vector<std::unique_ptr<ClusterTrace>>& traces) {
  const std::size_t n = launch.buffer_bytes.size();
  miss_.assign(n, 1);
  credit_.assign(n, 0.5);
  const double clusters = static_cast<double>(launch.clusters);
  const double scale = clusters / static_cast<double>(traces.size());
  double touched = 0;
  std::vector<double> unique(n, 0), loaded(n, 0);
  for (std::size_t b = 0; b < n; ++b) {
    for (const auto& trace : traces) {
      unique[b] += static_cast<double>(trace->buffers[b].unique());
      loaded[b] += static_cast<double>(trace->buffers[b].loaded);
    }
    unique[b] = std::min(static_cast<double>(launch.buffer_bytes[b]), unique[b] * scale);
    loaded[b] *= scale;
    touched += unique[b];
  }
  const double side_by_side = std::min(clusters * launch.cluster_size, double(gpu.sms));
  const bool exceeds = touched > gpu.l2_megabytes * 1e6;
  for (std::size_t b = 0; b < n; ++b) {
    if (loaded[b] == 0) continue;
    const double least = std::min(1.0, unique[b] / loaded[b]);
    miss_[b] = exceeds ? std::max(least, std::min(1.0, 1 / std::sqrt(side_by_side))) : least;
  }
}

bool L2::misses(std::uint16_t buffer) {
  if (buffer >= miss_.size()) return false;
  credit_[buffer] += miss_[buffer];
  const bool miss = credit_[buffer] >= 1;
  if (miss) credit_[buffer] -= 1;
  return miss;
}

}  // namespace torchext::sim::timing
