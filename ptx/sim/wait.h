// Why a group of lanes does not go on, for deadlock reports.
#pragma once

#include <string>

namespace torchext::sim {

class Warp;
struct Group;

bool may_time_out(Warp& warp, const Group& group);  // it stands at an mbarrier.try_wait
std::string wait_reason(Warp& warp, const Group& group);

}  // namespace torchext::sim
