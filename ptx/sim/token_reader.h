// Walks over tokens: looking ahead, taking what is expected, reading numbers.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "ir.h"
#include "lexer.h"

namespace torchext::sim {

inline bool starts_with_digit(const std::string& s) {
  return !s.empty() && s[0] >= '0' && s[0] <= '9';
}

class TokenReader {
 public:
  TokenReader(const std::string& text, std::string name)
      : name_(std::move(name)), tokens_(tokenize(text, name_)) {}

 protected:
  [[noreturn]] void fail(const std::string& what) const { fail_at(peek().line, what); }
  [[noreturn]] void fail_at(std::uint32_t line, const std::string& what) const {
    throw PtxError(name_, line, what);
  }
  const Token& peek(std::size_t ahead = 0) const {
    const std::size_t i = at_ + ahead;
    return tokens_[i < tokens_.size() ? i : tokens_.size() - 1];
  }
  Token take() {
    Token t = peek();
    if (t.kind != Token::end) ++at_;
    return t;
  }
  bool accept(char c) {
    if (!peek().is(c)) return false;
    ++at_;
    return true;
  }
  bool accept(const char* word) {
    if (!peek().is(word)) return false;
    ++at_;
    return true;
  }
  void expect(char c) {
    if (!accept(c)) fail(std::string("expected '") + c + "', got '" + peek().text + "'");
  }
  std::string take_word() {
    if (peek().kind != Token::word) fail("expected a name, got '" + peek().text + "'");
    return take().text;
  }
  void skip_line() {
    const std::uint32_t line = peek().line;
    while (peek().kind != Token::end && peek().line == line) ++at_;
  }
  void skip_to_semicolon() {
    while (!peek().is(';')) {
      if (peek().kind == Token::end) fail("expected ';'");
      ++at_;
    }
    ++at_;
  }

  std::uint64_t parse_integer(const std::string& word) const;
  std::uint32_t take_integer();
  Arg number(const std::string& word, bool minus) const;  // a number token, sign already seen

 private:
  std::string name_;
  std::vector<Token> tokens_;
  std::size_t at_ = 0;
};

}  // namespace torchext::sim
