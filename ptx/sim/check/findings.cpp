// Findings: their kinds, and how they are collected.
#include "findings.h"

#include <algorithm>
#include <string_view>
#include <utility>

namespace torchext::sim {

const std::vector<KindRow>& finding_kinds() {
  static const std::vector<KindRow> kRows = {
#define FINDING(identifier, grade, name, remedy, example) \
  {FindingKind::identifier, Grade::grade, name, remedy, example},
#include "finding_kinds.inc"
#undef FINDING
  };
  return kRows;
}

const KindRow& row_of(FindingKind kind) {
  return finding_kinds()[static_cast<std::size_t>(kind)];
}

const char* name_of(Grade grade) {
  return grade == Grade::error ? "error" : "note";
}

namespace {
// Reports list errors first, then what the smallest CTA found. Of findings of one CTA, the first
// comes first.
auto place_in_report(const Finding& f) {
  return std::tuple(f.grade(), f.cta[2], f.cta[1], f.cta[0], f.ptx_line,
                    std::string_view(row_of(f.kind).name));
}

bool comes_first(const Finding& a, const Finding& b) {
  return place_in_report(a) < place_in_report(b);
}

bool equal(const Finding& a, const Finding& b) {
  return a.kind == b.kind && a.ptx_line == b.ptx_line && a.other.ptx_line == b.other.ptx_line &&
         a.other.gpu == b.other.gpu;
}
}  // namespace

void FindingSink::add(Finding finding) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (finding.remedy.empty()) finding.remedy = row_of(finding.kind).remedy;
  const auto known = std::find_if(findings_.begin(), findings_.end(),
                                  [&](const Finding& f) { return equal(f, finding); });
  if (known != findings_.end()) {
    if (comes_first(finding, *known)) *known = std::move(finding);
    return;
  }
  const auto grade = finding.grade();
  findings_.push_back(std::move(finding));
  std::size_t& kept = kept_[static_cast<std::size_t>(grade)];
  if (++kept <= cap_) return;
  // One is too many: the last one of the kind that has the most, so that none crowds out another.
  full_ = true;
  --kept;
  const auto of_kind = [&](FindingKind kind) {
    return std::count_if(findings_.begin(), findings_.end(),
                         [&](const Finding& f) { return f.kind == kind; });
  };
  auto last = findings_.end();
  std::ptrdiff_t most = 0;
  for (auto f = findings_.begin(); f != findings_.end(); ++f) {
    if (f->grade() != grade) continue;
    const std::ptrdiff_t count = of_kind(f->kind);
    if (count > most || (count == most && comes_first(*last, *f))) {
      last = f;
      most = count;
    }
  }
  findings_.erase(last);
}

std::vector<Finding> FindingSink::take() {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::stable_sort(findings_.begin(), findings_.end(), comes_first);
  return std::move(findings_);
}

std::string hex(std::uint64_t value) {
  char text[32];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

}  // namespace torchext::sim
