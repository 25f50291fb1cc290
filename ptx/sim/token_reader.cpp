// Numbers as PTX writes them.
#include "token_reader.h"

#include <cstring>

namespace torchext::sim {

std::uint64_t TokenReader::parse_integer(const std::string& word) const {
  std::string s = word;
  while (!s.empty() && (s.back() == 'U' || s.back() == 'u')) s.pop_back();
  int base = 10;
  std::size_t start = 0;
  if (s.size() > 1 && s[0] == '0') {
    if (s[1] == 'x' || s[1] == 'X')
      base = 16, start = 2;
    else if (s[1] == 'b' || s[1] == 'B')
      base = 2, start = 2;
    else
      base = 8, start = 1;
  }
  std::uint64_t value = 0;
  if (start == s.size()) fail("'" + word + "' is not a number");
  for (std::size_t i = start; i < s.size(); ++i) {
    const char c = s[i];
    const int digit = c >= '0' && c <= '9'   ? c - '0'
                      : c >= 'a' && c <= 'f' ? c - 'a' + 10
                      : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                             : 99;
    if (digit >= base) fail("'" + word + "' is not a number");
    value = value * static_cast<std::uint64_t>(base) + static_cast<std::uint64_t>(digit);
  }
  return value;
}

std::uint32_t TokenReader::take_integer() {
  const std::string word = take_word();
  if (!starts_with_digit(word)) fail("expected a number, got '" + word + "'");
  return static_cast<std::uint32_t>(parse_integer(word));
}

Arg TokenReader::number(const std::string& word, bool minus) const {
  Arg arg;
  const bool hexadecimal_float =
      word.size() > 2 && word[0] == '0' && std::strchr("fFdD", word[1]) != nullptr;
  if (hexadecimal_float) {
    const bool is_double = word[1] == 'd' || word[1] == 'D';
    const std::uint64_t bits = parse_integer("0x" + word.substr(2));
    double value;
    if (is_double) {
      std::memcpy(&value, &bits, 8);
    } else {
      const auto low = static_cast<std::uint32_t>(bits);
      float single;
      std::memcpy(&single, &low, 4);
      value = static_cast<double>(single);
      arg.offset = static_cast<std::int64_t>(low);  // f32 bits, exact for a NaN too
    }
    if (minus) value = -value;
    arg.kind = Arg::real;
    std::memcpy(&arg.bits, &value, 8);
    arg.text = is_double ? "d" : "f";
    if (!is_double && minus) arg.offset ^= 0x80000000;
    return arg;
  }
  if (word.find('.') != std::string::npos) {
    double value = 0;
    try {
      value = std::stod(word);
    } catch (const std::exception&) {
      fail("'" + word + "' is not a number");
    }
    if (minus) value = -value;
    arg.kind = Arg::real;
    arg.text = "d";
    std::memcpy(&arg.bits, &value, 8);
    return arg;
  }
  arg.kind = Arg::integer;
  arg.bits = parse_integer(word);
  if (minus) arg.bits = ~arg.bits + 1;
  return arg;
}

}  // namespace torchext::sim
