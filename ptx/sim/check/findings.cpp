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

void FindingSink::add(Finding finding) {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::size_t& kept = kept_[static_cast<std::size_t>(finding.grade())];
  if (kept >= cap_) {
    full_ = true;
    return;
  }
  if (!seen_.insert({finding.kind, finding.ptx_line, finding.other.ptx_line}).second) return;
  if (finding.remedy.empty()) finding.remedy = row_of(finding.kind).remedy;
  ++kept;
  findings_.push_back(std::move(finding));
}

std::vector<Finding> FindingSink::take() {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::stable_sort(findings_.begin(), findings_.end(), [](const Finding& a, const Finding& b) {
    const auto key = [](const Finding& f) {
      return std::tuple(f.grade(), f.cta[2], f.cta[1], f.cta[0], f.ptx_line,
                        std::string_view(row_of(f.kind).name));
    };
    return key(a) < key(b);
  });
  return std::move(findings_);
}

std::string hex(std::uint64_t value) {
  char text[32];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

}  // namespace torchext::sim
