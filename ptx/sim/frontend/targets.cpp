// The table of minimum targets, one row for each form of an instruction that not every target has.
// It is the only place that states a target: a row of the opcode table (decode.h) cannot, since the
// target depends on modifiers, types and shapes. Each row was compared with ptxas 13.0
// (tests/sim/test_targets.py repeats this where there is a ptxas). PTX versions are not checked:
// they say which compiler is needed, not which GPU.
#include "targets.h"

#include <algorithm>
#include <string>
#include <unordered_map>
#include <vector>

#include "lexer.h"

namespace torchext::sim {
namespace {

enum Suffix {
  any,       // that target and all later ones
  specific,  // later ones too, but only architecture-specific targets: sm_90a, sm_100a, sm_120f
  family,    // architecture-specific targets of the same generation: sm_90a alone, sm_100a and
             // sm_103a
};

struct Row {
  // The opcode, then what must be among its modifiers. "x|y": either. "x x": twice. "!x": no
  // modifier is x. "#3": so many operands.
  const char* form;
  int target;
  Suffix suffix = any;
};

const Row kRows[] = {
    // Integers, logic
    {"add|min|max u16x2|s16x2", 90},
    {"min|max relu s32", 90},
    // Floating point
    {"add|sub|mul bf16|bf16x2", 90},
    {"fma bf16|bf16x2|relu", 80},
    {"fma oob", 90},
    {"add|sub|mul|fma f32x2", 100},
    {"add|sub|fma f32 f16|bf16", 100},
    {"neg|abs bf16|bf16x2", 80},
    {"min|max f16|f16x2|bf16|bf16x2|NaN", 80},
    {"min|max xorsign", 86},
    {"min|max f32 #4", 100},
    {"set|setp bf16|bf16x2", 90},
    {"ex2 f16|f16x2", 75},
    {"ex2 bf16|bf16x2", 90},
    {"tanh", 75},
    {"tanh bf16|bf16x2", 90},
    // Conversion
    {"cvt bf16|bf16x2|tf32|relu", 80},
    {"cvt f16x2 f32", 80},
    {"cvt bf16 bf16|f16|f64|u8|s8|u16|s16|u32|s32|u64|s64", 90},
    {"cvt tf32 rn|rz", 90},
    {"cvt e4m3x2|e5m2x2", 89},
    {"cvt ue8m0x2|e2m1x2|e2m3x2|e3m2x2", 100, specific},
    {"cvt rs", 100, family},
    // Loads, stores, caches
    {"ld|st|atom|red|cvta|isspacep shared::cluster", 90},
    {"ld|st|atom|red cluster", 90},
    {"ld|st|atom|red L2::cache_hint", 80},
    {"ld L2::256B", 80},
    {"ld|st v8", 100},
    {"ld|st v4 b64|u64|s64|f64", 100},
    {"st|red async", 90},
    {"st|red async mmio", 100},
    {"st bulk", 100},
    {"atom|red bf16|bf16x2|v2|v4|v8|b128", 90},
    {"multimem", 90},
    {"prefetch L2::evict_last|L2::evict_normal", 80},
    {"prefetch tensormap", 90},
    {"applypriority|discard|createpolicy", 80},
    // Copies
    {"cp", 80},
    {"cp bulk", 90},
    {"cp cp_mask", 100},
    {"cp cta_group::1|cta_group::2", 100, family},
    {"tensormap", 90},
    {"tensormap replace", 90, specific},
    // Warps, CTAs, clusters
    {"bmsk|szext|match|nanosleep", 70},
    {"redux", 80},
    {"redux f32", 100, family},
    {"elect|mapa|getctarank|griddepcontrol", 90},
    {"barrier cluster", 90},
    {"clusterlaunchcontrol", 100},
    {"setmaxnreg", 90, specific},
    {"fence", 70},
    {"fence cluster|mbarrier_init|async|async::generic|tensormap::generic", 90},
    {"fence sync_restrict::shared::cta|sync_restrict::shared::cluster", 90},
    {"mbarrier", 80},
    {"mbarrier cluster|shared::cluster|relaxed|expect_tx|complete_tx|try_wait", 90},
    {"mbarrier arrive|arrive_drop !noComplete #3", 90},
    // Matrices
    {"ldmatrix|movmatrix", 75},
    {"stmatrix", 90},
    {"ldmatrix|stmatrix b8", 100, specific},
    {"mma|wmma", 70},
    {"mma m16n8k8|m8n8k16|m8n8k32|m8n8k128", 75},
    {"mma m16n8k4|m16n8k16|m16n8k32|m16n8k64|m16n8k128|m16n8k256", 80},
    {"mma|wmma bf16|tf32|f64|and", 80},
    {"mma sp|sp::ordered_metadata", 80},
    {"mma m16n8k4|m16n8k8|m16n8k16 f64", 90},
    {"mma e4m3|e5m2", 89},
    {"mma kind::f8f6f4|kind::mxf8f6f4|kind::mxf4|kind::mxf4nvf4", 120, specific},
    {"wmma s8|u8|s32", 72},
    {"wmma s4|u4|b1", 75},
    {"wmma m8n8k32|m8n8k128", 75},
    {"wmma m16n16k8", 80},
    {"wgmma", 90, family},
    {"tcgen05", 100, specific},
};

// By the beginning of the name.
const std::pair<const char*, int> kSpecialRegisters[] = {
    {"%clusterid", 90},           {"%nclusterid", 90},     {"%cluster_", 90},
    {"%is_explicit_cluster", 90}, {"%aggr_smem_size", 90}, {"%reserved_smem_offset_", 80},
};

struct Form {
  std::vector<std::vector<std::string>> words;  // alternatives of each
  std::vector<std::string> absent;
  std::size_t operands = 0;  // 0: any number
  const Row* row;

  bool fits(const RawInstruction& i) const {
    if (operands != 0 && i.args.size() != operands) return false;
    std::vector<std::string> left(i.parts.begin() + 1, i.parts.end());
    for (const std::string& word : absent) {
      if (std::find(left.begin(), left.end(), word) != left.end()) return false;
    }
    for (const auto& alternatives : words) {
      const auto part =
          std::find_first_of(left.begin(), left.end(), alternatives.begin(), alternatives.end());
      if (part == left.end()) return false;
      left.erase(part);
    }
    return true;
  }
};

const std::unordered_map<std::string, std::vector<Form>>& forms() {
  static const auto kForms = [] {
    std::unordered_map<std::string, std::vector<Form>> all;
    for (const Row& row : kRows) {
      std::vector<std::string> words = split(row.form, ' ');
      Form form;
      form.row = &row;
      for (auto word = words.begin() + 1; word != words.end(); ++word) {
        if ((*word)[0] == '#') {
          form.operands = std::stoul(word->substr(1));
        } else if ((*word)[0] == '!') {
          form.absent.push_back(word->substr(1));
        } else {
          form.words.push_back(split(*word, '|'));
        }
      }
      for (const std::string& opcode : split(words[0], '|')) all[opcode].push_back(form);
    }
    return all;
  }();
  return kForms;
}

std::string name_of(int target, Suffix suffix) {
  return "sm_" + std::to_string(target) + (suffix == any ? "" : "a");
}

bool meets(const ParsedModule::Source& source, const Row& row) {
  if (source.target_number < row.target) return false;
  const char last = source.target.empty() ? ' ' : source.target.back();
  const bool is_specific = last == 'a' || last == 'f';
  return row.suffix == any ||
         (is_specific && (row.suffix == specific || source.target_number / 10 == row.target / 10));
}

[[noreturn]] void refuse(const ParsedModule::Source& source, std::uint32_t line,
                         const std::string& what, int target, Suffix suffix) {
  const std::string least = name_of(target, suffix);
  const std::string needed =
      suffix == any        ? least + " or later"
      : suffix == specific ? least + " or a later architecture-specific target"
      : target == 90       ? least
                           : least + " or another architecture-specific target of its generation";
  throw PtxError(source.name, line - source.lines_before,
                 what + ": .target must be " + needed + " (got " + source.target + ")");
}

void check_special_registers(const ParsedModule::Source& source, const RawInstruction& i,
                             const std::vector<Arg>& args) {
  for (const Arg& arg : args) {
    if (arg.kind == Arg::special) {
      for (const auto& [name, target] : kSpecialRegisters) {
        if (source.target_number < target && arg.text.rfind(name, 0) == 0)
          refuse(source, i.line, arg.text, target, any);
      }
    }
    check_special_registers(source, i, arg.args);
  }
}

}  // namespace

std::string least_target(const std::string& opcode) {
  const auto found = forms().find(opcode);
  if (found == forms().end()) return "";
  for (const Form& form : found->second) {
    if (form.words.empty() && form.absent.empty() && form.operands == 0)
      return name_of(form.row->target, form.row->suffix);
  }
  return "";
}

void check_target(const ParsedModule::Source& source, const RawInstruction& i) {
  const Row* missing = nullptr;  // of those, the one that asks most
  if (const auto found = forms().find(i.parts[0]); found != forms().end()) {
    for (const Form& form : found->second) {
      if (meets(source, *form.row) || !form.fits(i)) continue;
      if (missing == nullptr || form.row->target >= missing->target) missing = form.row;
    }
  }
  if (missing != nullptr) refuse(source, i.line, i.opcode, missing->target, missing->suffix);
  check_special_registers(source, i, i.args);
}

void check_target(const ParsedModule::Source& source, const Function& f) {
  if (source.target_number < 90 && (f.cluster[0] != 0 || f.explicit_cluster)) {
    refuse(source, f.line,
           f.cluster[0] != 0 ? ".reqnctapercluster of '" + f.name + "'"
                             : ".explicitcluster of '" + f.name + "'",
           90, any);
  }
}

}  // namespace torchext::sim
