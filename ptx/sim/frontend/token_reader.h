// Reads tokens one after another: looks ahead, takes expected tokens, reads numbers and constant
// expressions.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "ir.h"
#include "lexer.h"

namespace torchext::sim {

class TokenReader {
 public:
  TokenReader(const std::string& text, std::string name)
      : name_(std::move(name)), tokens_(tokenize(text, name_)) {}

 protected:
  [[noreturn]] void fail(const std::string& what) const { fail_at(peek().line, what); }
  [[noreturn]] void fail_at(std::uint32_t line, const std::string& what) const {
    throw PtxError(name_, line, what);
  }
  // Fails at the next token.
  [[noreturn]] void fail_token(const std::string& expected) const {
    fail("the next token must be " + expected + " (got " +
         (peek().kind == Token::end ? "the end of the text" : "'" + peek().text + "'") + ")");
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
    if (!accept(c)) fail_token(std::string("'") + c + "'");
  }
  std::string take_word() {
    if (peek().kind != Token::word) fail_token("a name");
    return take().text;
  }
  void skip_to_semicolon() {
    while (!peek().is(';')) {
      if (peek().kind == Token::end) fail_token("';'");
      ++at_;
    }
    ++at_;
  }

  std::uint32_t last_line() const { return tokens_.back().line; }

  std::uint32_t take_integer();  // a literal below 2^32

  // What cannot begin a constant expression is no operand either.
  bool at_constant() const;
  // An integer or a real, evaluated by the rules of PTX ISA "Constant Expressions".
  Arg constant_expression();
  Arg constant_term();              // a product or a factor, as may follow "name +"
  std::int64_t constant_integer();  // an expression that must be an integer

  // Limits the depth of recursion, for input such as ten thousand brackets.
  class Nested {
   public:
    explicit Nested(TokenReader& reader) : reader_(reader) {
      if (++reader_.nesting_ > 64) reader_.fail("nested too deeply");
    }
    ~Nested() { --reader_.nesting_; }
    Nested(const Nested&) = delete;
    Nested& operator=(const Nested&) = delete;

   private:
    TokenReader& reader_;
  };

 private:
  Arg conditional_expression();
  Arg binary_expression(int lowest);
  Arg unary_expression();
  Arg number_literal();
  Arg combined(const std::string& op, const Arg& x, const Arg& y, std::uint32_t line) const;

  std::string name_;
  std::vector<Token> tokens_;
  std::size_t at_ = 0;
  int nesting_ = 0;
};

}  // namespace torchext::sim
