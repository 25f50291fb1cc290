// The layout of a rendered report.
#include "rendering.h"

#include <set>
#include <sstream>
#include <vector>

#include "../frontend/demangle.h"
#include "../frontend/source_map.h"

namespace torchext::sim {
namespace {

void quote(std::ostream& out, const std::string& file, std::uint32_t number,
           const std::string& text) {
  out << "  --> " << file << ':' << number << '\n';
  if (text.empty()) return;
  std::string label = std::to_string(number);
  if (label.size() < 5) label.insert(0, 5 - label.size(), ' ');
  out << label << " | " << text << '\n';
}

// The CUDA line, outermost function first, then the PTX line.
void quote_both(std::ostream& out, const SourceMap& map, std::uint32_t ptx_line) {
  if (ptx_line == 0) return;
  const std::vector<SourceFrame> frames = map.frames(ptx_line);
  for (auto frame = frames.rbegin(); frame != frames.rend(); ++frame) {
    if (frame == frames.rbegin()) {
      quote(out, frame->file, frame->line, source_text(*frame));
    } else {
      out << "      inlined " << frame->file << ':' << frame->line << '\n';
    }
  }
  const auto [module, line] = map.place(ptx_line);
  quote(out, module, line, map.text(ptx_line));
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

std::string counted(std::uint64_t count, const char* noun) {
  return std::to_string(count) + " " + noun + (count == 1 ? "" : "s");
}

std::string with_separators(std::uint64_t number) {
  std::string text = std::to_string(number);
  for (int at = static_cast<int>(text.size()) - 3; at > 0; at -= 3) text.insert(at, ",");
  return text;
}

void render_other(std::ostream& out, const Finding& f, const SourceMap& map) {
  if (f.other.what.empty()) return;
  out << "      = other: " << f.other.what << '\n';
  quote_both(out, map, f.other.ptx_line);
}

// Identifies the lines that a reader would look at.
std::string place_of(const SourceMap& map, std::uint32_t ptx_line) {
  std::string place;
  for (const SourceFrame& frame : map.frames(ptx_line)) {
    place += frame.file + ':' + std::to_string(frame.line) + ' ';
  }
  return place.empty() ? std::to_string(ptx_line) : place;
}

// "no findings", "2 findings", "3 findings, of which 1 is a note".
std::string summary(const Report& report) {
  if (report.findings.empty()) return "no findings";
  const std::size_t notes = report.count(Grade::note);
  std::string text = counted(report.findings.size(), "finding");
  if (notes == report.findings.size()) {
    text = counted(notes, "note");
  } else if (notes != 0) {
    text += ", of which " + std::to_string(notes) + (notes == 1 ? " is a note" : " are notes");
  }
  return text;
}

bool same_fault(const Finding& a, const Finding& b) {
  return a.kind == b.kind && a.message == b.message && a.ptx_line == b.ptx_line;
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

std::shared_ptr<const SourceMap> map_of(const Report& report, const std::vector<SourceText>& ptx) {
  return std::make_shared<const SourceMap>(report.findings.empty() ? std::vector<SourceText>()
                                                                   : ptx);
}

std::string render(const Report& report, const std::string& kernel, const LaunchOptions& options,
                   const std::vector<SourceText>& ptx) {
  return render(report, kernel, options, {map_of(report, ptx)}, 0, -1);
}

std::string render(const Report& report, const std::string& kernel, const LaunchOptions& options,
                   const std::vector<std::shared_ptr<const SourceMap>>& maps, std::size_t gpu,
                   int device) {
  std::ostringstream out;
  if (device >= 0) out << "device " << device << ", ";
  out << "kernel '" << short_name(kernel) << "': " << summary(report)
      << (report.findings_truncated ? " (more were dropped)" : "") << " (seed=" << options.seed
      << ", completion=\"" << name_of(options.completion) << "\", "
      << with_separators(report.warp_instructions) << " warp-instructions)\n";
  const SourceMap& map = *maps[gpu];
  const auto other_map = [&](const Finding& f) -> const SourceMap& {
    return f.other.what.empty() ? map : *maps[f.other.gpu];
  };
  for (auto f = report.findings.begin(); f != report.findings.end();) {
    out << '\n'
        << name_of(f->grade()) << ": " << row_of(f->kind).name << ": " << f->message << '\n';
    quote_both(out, map, f->ptx_line);
    out << "      = where: ";
    if (f->device >= 0) out << "device " << f->device << ", ";
    out << "CTA (" << f->cta[0] << ", " << f->cta[1] << ", " << f->cta[2] << ")";
    if (f->lanes != 0) out << ", warp " << f->warp << ", " << lanes_text(f->lanes);
    if (f->address != 0) out << ", address " << hex(f->address);
    out << '\n';
    render_other(out, *f, other_map(*f));
    // Several findings about one instruction: print each CUDA line once.
    auto next = f + 1;
    std::set<std::string> shown = {place_of(other_map(*f), f->other.ptx_line)};
    int like_shown = 0;
    for (; next != report.findings.end() && same_fault(*f, *next); ++next) {
      if (shown.insert(place_of(other_map(*next), next->other.ptx_line)).second) {
        render_other(out, *next, other_map(*next));
      } else {
        ++like_shown;
      }
    }
    if (like_shown != 0) out << "      = and " << like_shown << " more from lines shown\n";
    if (!f->remedy.empty()) out << "      = remedy: " << f->remedy << '\n';
    f = next;
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
