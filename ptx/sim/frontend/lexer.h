// Splits PTX into tokens. Each of these is one token: a dotted opcode, a %register, an "a::b"
// modifier, a number with the sign of its exponent, an operator of two characters.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace torchext::sim {

struct Token {
  enum Kind : std::uint8_t { word, number, string, punctuation, end };
  Kind kind = end;
  std::string text;
  std::uint32_t line = 0;
  bool is(char c) const { return kind == punctuation && text.size() == 1 && text[0] == c; }
  bool is(const char* s) const { return (kind == word || kind == punctuation) && text == s; }
};

std::vector<Token> tokenize(const std::string& text, const std::string& module);

// The parts of `text` between separators; "a..b" has an empty one.
std::vector<std::string> split(const std::string& text, char separator);

}  // namespace torchext::sim
