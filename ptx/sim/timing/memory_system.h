// Device memory, and which loads L2 serves. All SMs of the GPU share both, of which the replay
// simulates one group: a request stands for `multiplicity` like it.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <queue>
#include <utility>
#include <vector>

#include "replay.h"

namespace torchext::sim::timing {

class DeviceMemory {
 public:
  explicit DeviceMemory(const Constants& constants) : c_(constants) {}
  // `rate` is that of the whole GPU, in bytes per cycle. Forgets all requests.
  void start(double rate);
  // The latency of a request for `bytes` at `now`.
  double request(double now, double bytes, double multiplicity);
  double bytes() const { return bytes_; }  // that were requested, each counted once
  double rate() const { return rate_; }

 private:
  void settle(double time);

  const Constants& c_;
  using InFlight = std::pair<double, double>;  // until when, and bytes
  std::priority_queue<InFlight, std::vector<InFlight>, std::greater<InFlight>> in_flight_;
  double rate_ = 0, bytes_in_flight_ = 0, average_in_flight_ = 0, settled_ = 0, free_ = 0,
         bytes_ = 0;
};

// Says of each load whether it misses, so often as its buffer's loads do over the launch.
class L2 {
 public:
  L2(const Gpu& gpu, const LaunchShapeOf& launch,
     const std::vector<std::unique_ptr<ClusterTrace>>& traces);
  bool misses(std::uint16_t buffer);

 private:
  std::vector<double> miss_, credit_;  // by buffer
};

}  // namespace torchext::sim::timing
