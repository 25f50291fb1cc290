// Why a group of lanes does not go on, for deadlock reports.
#pragma once

#include <string>

namespace torchext::sim {

class Warp;
struct Group;

std::string wait_reason(Warp& warp, const Group& group);

}  // namespace torchext::sim
