// Reads .file and .loc directives (PTX ISA "Debugging Directives").
#include "source_map.h"

#include <algorithm>
#include <filesystem>
#include <fstream>

namespace torchext::sim {
namespace {

std::string stripped(const std::string& line) {
  const auto begin = line.find_first_not_of(" \t");
  if (begin == std::string::npos) return "";
  return line.substr(begin, line.find_last_not_of(" \t\r") + 1 - begin);
}

bool starts_with(const std::string& text, const char* prefix) {
  return text.rfind(prefix, 0) == 0;
}

std::string shortened(const std::string& path) {
  std::error_code error;
  const auto normal = std::filesystem::path(path).lexically_normal();
  const auto here = std::filesystem::current_path(error);
  if (error || !normal.is_absolute()) return normal.string();
  const auto relative = normal.lexically_relative(here).string();
  return relative.empty() || starts_with(relative, "..") ? normal.string() : relative;
}

}  // namespace

SourceMap::SourceMap(const std::vector<SourceText>& texts) {
  for (const SourceText& module : texts) {
    const auto index = static_cast<std::uint32_t>(modules_.size());
    modules_.emplace_back(module.name, static_cast<std::uint32_t>(lines_.size()));
    add(module.text, index);
  }
}

void SourceMap::add(const std::string& ptx, std::uint32_t module) {
  for (std::size_t begin = 0; begin <= ptx.size();) {
    const std::size_t end = std::min(ptx.find('\n', begin), ptx.size());
    const std::string line = stripped(ptx.substr(begin, end - begin));
    begin = end + 1;
    lines_.push_back(line);
    if (starts_with(line, ".file")) {
      unsigned number = 0;
      const auto open = line.find('"'), close = line.rfind('"');
      if (std::sscanf(line.c_str(), ".file %u", &number) == 1 && close > open) {
        files_[{module, number}] = shortened(line.substr(open + 1, close - open - 1));
      }
    } else if (starts_with(line, ".loc")) {
      Location l;
      l.ptx_line = static_cast<std::uint32_t>(lines_.size());
      l.module = module;
      if (std::sscanf(line.c_str(), ".loc %u %u %u", &l.file, &l.line, &l.column) != 3) continue;
      const auto at = line.find("inlined_at");
      l.inlined = at != std::string::npos && std::sscanf(line.c_str() + at, "inlined_at %u %u %u",
                                                         &l.at_file, &l.at_line, &l.at_column) == 3;
      locations_.push_back(l);
    }
  }
}

std::pair<std::string, std::uint32_t> SourceMap::place(std::uint32_t number) const {
  std::size_t m = modules_.size();
  while (m > 1 && modules_[m - 1].second >= number) --m;
  if (m == 0) return {"", number};
  return {modules_[m - 1].first, number - modules_[m - 1].second};
}

std::string SourceMap::text(std::uint32_t number) const {
  return number == 0 || number > lines_.size() ? "" : lines_[number - 1];
}

std::vector<SourceFrame> SourceMap::frames(std::uint32_t number) const {
  const auto after =
      std::upper_bound(locations_.begin(), locations_.end(), number,
                       [](std::uint32_t n, const Location& l) { return n < l.ptx_line; });
  std::vector<SourceFrame> frames;
  for (auto at = after; at != locations_.begin();) {
    const Location& l = *--at;
    const auto file = files_.find({l.module, l.file});
    if (file == files_.end() || l.line == 0) return frames;
    frames.push_back(SourceFrame{file->second, l.line});
    if (!l.inlined) return frames;
    // The .loc of the call comes before, and says where the caller itself was inlined.
    const auto caller = std::find_if(
        std::make_reverse_iterator(at), locations_.rend(), [&](const Location& candidate) {
          return candidate.module == l.module && candidate.file == l.at_file &&
                 candidate.line == l.at_line && candidate.column == l.at_column;
        });
    if (caller == locations_.rend()) {
      const auto at_file = files_.find({l.module, l.at_file});
      if (at_file != files_.end()) frames.push_back(SourceFrame{at_file->second, l.at_line});
      return frames;
    }
    at = caller.base();
  }
  return frames;
}

std::string source_text(const SourceFrame& frame) {
  std::ifstream file(frame.file);
  std::string line;
  for (std::uint32_t i = 0; i < frame.line; ++i) {
    if (!std::getline(file, line)) return "";
  }
  return stripped(line);
}

}  // namespace torchext::sim
