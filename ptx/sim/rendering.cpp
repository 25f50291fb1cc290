// The layout of a rendered report.
#include "rendering.h"

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <sstream>
#include <vector>

namespace torchext::sim {
namespace {

// Line `number` (from 1) without its indentation; empty if there is none.
std::string line_of(std::istream& text, std::uint32_t number) {
  std::string line;
  for (std::uint32_t i = 0; i < number; ++i) {
    if (!std::getline(text, line)) return "";
  }
  const auto begin = line.find_first_not_of(" \t");
  if (number == 0 || begin == std::string::npos) return "";
  return line.substr(begin, line.find_last_not_of(" \t\r") + 1 - begin);
}

void quote(std::ostream& out, const std::string& file, std::uint32_t number,
           const std::string& text) {
  out << "  --> " << file << ':' << number << '\n';
  if (text.empty()) return;
  std::string label = std::to_string(number);
  if (label.size() < 5) label.insert(0, 5 - label.size(), ' ');
  out << label << " | " << text << '\n';
}

// A mask as ranges: "lanes 0-3, 8".
std::string lanes_text(std::uint32_t mask) {
  std::string ranges;
  int count = 0;
  for (int lane = 0; lane < 32;) {
    if (!(mask >> lane & 1)) {
      ++lane;
      continue;
    }
    int last = lane;
    while (last < 31 && (mask >> (last + 1) & 1)) ++last;
    ranges += (ranges.empty() ? "" : ", ") + std::to_string(lane);
    if (last > lane) ranges += "-" + std::to_string(last);
    count += last - lane + 1;
    lane = last + 1;
  }
  return (count == 1 ? "lane " : "lanes ") + ranges;
}

std::string hexadecimal(std::uint64_t value) {
  char text[24];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

std::string counted(std::uint64_t count, const char* noun) {
  return std::to_string(count) + " " + noun + (count == 1 ? "" : "s");
}

std::string with_separators(std::uint64_t number) {
  std::string text = std::to_string(number);
  for (int at = static_cast<int>(text.size()) - 3; at > 0; at -= 3) text.insert(at, ",");
  return text;
}

void render_finding(std::ostream& out, const Finding& f, const std::string& ptx,
                    const std::string& module_name) {
  out << "error: " << f.kind << ": " << f.message << '\n';
  if (f.source_line != 0) {
    std::ifstream source(f.file);
    quote(out, f.file, f.source_line, source ? line_of(source, f.source_line) : "");
  }
  std::istringstream text(ptx);
  if (f.ptx_line != 0) quote(out, module_name, f.ptx_line, line_of(text, f.ptx_line));
  out << "      = where: CTA (" << f.cta[0] << ", " << f.cta[1] << ", " << f.cta[2] << ")";
  if (f.lanes != 0) out << ", warp " << f.warp << ", " << lanes_text(f.lanes);
  if (f.address != 0) out << ", address " << hexadecimal(f.address);
  out << '\n';
  if (!f.other.empty() || f.other_ptx_line != 0) {
    out << "      = other: " << (f.other.empty() ? "the other access" : f.other) << '\n';
    if (f.other_ptx_line != 0) {
      std::istringstream again(ptx);
      quote(out, module_name, f.other_ptx_line, line_of(again, f.other_ptx_line));
    }
  }
  if (!f.remedy.empty()) out << "      = remedy: " << f.remedy << '\n';
}

}  // namespace

const char* name_of(LaunchOptions::Completion completion) {
  switch (completion) {
    case LaunchOptions::Eager:
      return "eager";
    case LaunchOptions::Late:
      return "late";
    case LaunchOptions::Random:
      return "random";
  }
  return "?";
}

std::string render(const Report& report, const std::string& kernel, const LaunchOptions& options,
                   const std::string& ptx, const std::string& module_name) {
  std::ostringstream out;
  out << "kernel '" << kernel
      << "': " << (report.ok() ? "no findings" : counted(report.findings.size(), "finding"))
      << (report.findings_truncated ? " (more were dropped)" : "") << " (seed=" << options.seed
      << ", completion=\"" << name_of(options.completion) << "\", "
      << with_separators(report.warp_instructions) << " warp-instructions)\n";
  for (const Finding& finding : report.findings) {
    out << '\n';
    render_finding(out, finding, ptx, module_name);
  }
  for (const auto& gap : report.unwritten) {
    out << "\nnote: " << counted(gap.bytes, "byte") << " of output '" << gap.buffer
        << "' were not written, the first at offset " << gap.first_offset << '\n';
  }
  if (!report.output.empty()) out << "\nprinted by the kernel:\n" << report.output;
  std::string text = out.str();
  while (!text.empty() && text.back() == '\n') text.pop_back();
  return text;
}

}  // namespace torchext::sim
