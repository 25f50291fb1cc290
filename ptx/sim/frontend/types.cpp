// Names and sizes of PTX types.
#include <utility>

#include "ir.h"

namespace torchext::sim {

namespace {

const std::pair<const char*, Type> kTypeNames[] = {
    {"pred", Type::pred},     {"b8", Type::b8},           {"b16", Type::b16},
    {"b32", Type::b32},       {"b64", Type::b64},         {"b128", Type::b128},
    {"u8", Type::u8},         {"u16", Type::u16},         {"u32", Type::u32},
    {"u64", Type::u64},       {"s8", Type::s8},           {"s16", Type::s16},
    {"s32", Type::s32},       {"s64", Type::s64},         {"f16", Type::f16},
    {"f16x2", Type::f16x2},   {"bf16", Type::bf16},       {"bf16x2", Type::bf16x2},
    {"f32", Type::f32},       {"f64", Type::f64},         {"tf32", Type::tf32},
    {"e4m3", Type::e4m3},     {"e5m2", Type::e5m2},       {"e4m3x2", Type::e4m3x2},
    {"e5m2x2", Type::e5m2x2}, {"ue8m0x2", Type::ue8m0x2}, {"u16x2", Type::u16x2},
    {"s16x2", Type::s16x2},
};

}  // namespace

Type type_named(const std::string& name) {
  for (const auto& [text, type] : kTypeNames) {
    if (name == text) return type;
  }
  return Type::none;
}

const char* name_of(Type type) {
  for (const auto& [text, named] : kTypeNames) {
    if (named == type) return text;
  }
  return "";
}

int size_of(Type type) {
  switch (type) {
    case Type::none:
    case Type::pred:
      return 0;
    case Type::b8:
    case Type::u8:
    case Type::s8:
    case Type::e4m3:
    case Type::e5m2:
      return 1;
    case Type::b16:
    case Type::u16:
    case Type::s16:
    case Type::f16:
    case Type::bf16:
    case Type::e4m3x2:
    case Type::e5m2x2:
    case Type::ue8m0x2:
      return 2;
    case Type::b32:
    case Type::u32:
    case Type::s32:
    case Type::f32:
    case Type::f16x2:
    case Type::bf16x2:
    case Type::tf32:
    case Type::u16x2:
    case Type::s16x2:
      return 4;
    case Type::b64:
    case Type::u64:
    case Type::s64:
    case Type::f64:
      return 8;
    case Type::b128:
      return 16;
  }
  return 0;
}

bool same_sizes(const std::vector<Variable>& a, const std::vector<Variable>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](const Variable& x, const Variable& y) { return x.bytes == y.bytes; });
}

void collect_names(const Arg& arg, std::set<std::string>* names) {
  if (arg.kind == Arg::name) names->insert(arg.text);
  for (const Arg& a : arg.args) collect_names(a, names);
}

}  // namespace torchext::sim
