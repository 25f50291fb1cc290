// Numbers and constant expressions of PTX (PTX ISA, "Constants"): doubles, and 64-bit integers,
// which are signed unless they end in U or need the 64th bit. 0f... and 0d... give exact bits and
// cannot be part of an expression.
#include <cstdlib>
#include <cstring>

#include "../numerics/number_formats.h"
#include "token_reader.h"

namespace torchext::sim {

namespace {

// Arg::text gives the kind. Integer: "u" if unsigned. Real: "d" for a double, "f" for 32 exact bits
// (in Arg::offset), "x" for 64 exact bits.
Arg integer_constant(std::uint64_t bits, bool is_unsigned) {
  Arg arg;
  arg.kind = Arg::integer;
  arg.bits = bits;
  if (is_unsigned) arg.text = "u";
  return arg;
}

Arg real_constant(double value) {
  Arg arg;
  arg.kind = Arg::real;
  arg.text = "d";
  std::memcpy(&arg.bits, &value, 8);
  return arg;
}

double real_of(const Arg& arg) {
  if (arg.kind == Arg::integer) {
    return arg.text == "u" ? static_cast<double>(arg.bits)
                           : static_cast<double>(static_cast<std::int64_t>(arg.bits));
  }
  double value;
  std::memcpy(&value, &arg.bits, 8);
  return value;
}

bool is_exact(const Arg& arg) {
  return arg.kind == Arg::real && arg.text != "d";
}

bool is_nonzero(const Arg& arg) {
  return arg.kind == Arg::integer ? arg.bits != 0 : real_of(arg) != 0;
}

int precedence(const Token& token) {
  static const std::pair<const char*, int> kOperators[] = {
      {"||", 1}, {"&&", 2}, {"|", 3}, {"^", 4},  {"&", 5},  {"==", 6},
      {"!=", 6}, {"<", 7},  {">", 7}, {"<=", 7}, {">=", 7}, {"<<", 8},
      {">>", 8}, {"+", 9},  {"-", 9}, {"*", 10}, {"/", 10}, {"%", 10}};
  if (token.kind != Token::punctuation) return 0;
  for (const auto& [text, level] : kOperators) {
    if (token.text == text) return level;
  }
  return 0;
}
constexpr int kProducts = 10;

bool parse_digits(const std::string& s, std::size_t start, unsigned base, std::uint64_t* value) {
  *value = 0;
  if (start == s.size()) return false;
  for (std::size_t i = start; i < s.size(); ++i) {
    const char c = s[i];
    const int digit = c >= '0' && c <= '9'   ? c - '0'
                      : c >= 'a' && c <= 'f' ? c - 'a' + 10
                      : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                             : 99;
    if (digit >= static_cast<int>(base)) return false;
    if (*value > (~0ull - static_cast<unsigned>(digit)) / base) return false;  // beyond 64 bits
    *value = *value * base + static_cast<unsigned>(digit);
  }
  return true;
}

}  // namespace

std::uint64_t real_bits(const Arg& arg, Type type) {
  if (size_of(type) == 8)
    return arg.text == "f" ? static_cast<std::uint32_t>(arg.offset) : arg.bits;
  if (type == Type::f16) return encode_f16(real_of(arg));
  if (type == Type::bf16) return encode_bf16(real_of(arg));
  if (arg.text == "f") return static_cast<std::uint32_t>(arg.offset);
  const auto single = static_cast<float>(real_of(arg));
  std::uint32_t bits;
  std::memcpy(&bits, &single, 4);
  return bits;
}

Arg TokenReader::number_literal() {
  const std::uint32_t line = peek().line;
  const std::string word = take().text;
  const auto bad = [&] { fail_at(line, "'" + word + "' is not a number"); };
  const char prefix = word.size() > 1 && word[0] == '0' ? word[1] : '\0';
  std::uint64_t bits = 0;
  if (prefix == 'f' || prefix == 'F') {
    if (word.size() != 10 || !parse_digits(word, 2, 16, &bits)) bad();
    float single;
    const auto low = static_cast<std::uint32_t>(bits);
    std::memcpy(&single, &low, 4);
    Arg arg = real_constant(static_cast<double>(single));
    arg.text = "f";
    arg.offset = static_cast<std::int64_t>(low);  // a double would lose the bits of a NaN
    return arg;
  }
  if (prefix == 'd' || prefix == 'D') {
    if (word.size() != 18 || !parse_digits(word, 2, 16, &bits)) bad();
    Arg arg = real_constant(0);
    arg.text = "x";
    arg.bits = bits;
    return arg;
  }
  const bool hexadecimal = prefix == 'x' || prefix == 'X';
  if (!hexadecimal && word.find_first_of(".eE") != std::string::npos) {
    char* end = nullptr;
    const double value = std::strtod(word.c_str(), &end);
    if (*end != '\0') bad();
    return real_constant(value);
  }
  const bool is_unsigned = word.back() == 'U' || word.back() == 'u';
  const std::string digits = is_unsigned ? word.substr(0, word.size() - 1) : word;
  const bool binary = prefix == 'b' || prefix == 'B';
  const bool octal = digits.size() > 1 && digits[0] == '0' && !hexadecimal && !binary;
  const unsigned base = hexadecimal ? 16 : binary ? 2 : octal ? 8 : 10;
  if (!parse_digits(digits, hexadecimal || binary ? 2 : octal ? 1 : 0, base, &bits)) bad();
  return integer_constant(bits, is_unsigned || bits >> 63);
}

std::uint32_t TokenReader::take_integer() {
  if (peek().kind != Token::number) fail_token("a number");
  const std::uint32_t line = peek().line;
  const std::string word = peek().text;
  const Arg arg = number_literal();
  if (arg.kind != Arg::integer || arg.bits > ~0u)
    fail_at(line, "a number must be an integer below 2^32 here (got '" + word + "')");
  return static_cast<std::uint32_t>(arg.bits);
}

bool TokenReader::at_constant() const {
  const Token& t = peek();
  return t.kind == Token::number || t.is("WARP_SZ") || t.is('(') || t.is('-') || t.is('+') ||
         t.is('~') || t.is('!');
}

Arg TokenReader::constant_expression() {
  return conditional_expression();
}

Arg TokenReader::constant_term() {
  return binary_expression(kProducts);
}

std::int64_t TokenReader::constant_integer() {
  const std::uint32_t line = peek().line;
  const Arg arg = constant_expression();
  if (arg.kind != Arg::integer) fail_at(line, "an expression must be an integer here");
  return static_cast<std::int64_t>(arg.bits);
}

Arg TokenReader::conditional_expression() {
  const Nested nested(*this);
  Arg condition = binary_expression(1);
  if (!accept('?')) return condition;
  const Arg yes = conditional_expression();
  expect(':');
  const Arg no = conditional_expression();
  Arg chosen = is_nonzero(condition) ? yes : no;
  if (yes.kind != no.kind) return real_constant(real_of(chosen));
  if (chosen.kind == Arg::integer && (yes.text == "u" || no.text == "u")) chosen.text = "u";
  return chosen;
}

Arg TokenReader::binary_expression(int lowest) {
  Arg left = unary_expression();
  for (int level; (level = precedence(peek())) >= lowest;) {
    const Token op = take();
    const Arg right = binary_expression(level + 1);
    left = combined(op.text, left, right, op.line);
  }
  return left;
}

Arg TokenReader::unary_expression() {
  const Nested nested(*this);
  const Token token = peek();
  if (token.kind == Token::number) return number_literal();
  if (accept("WARP_SZ")) return integer_constant(32, false);
  if (accept('(')) {
    const bool to_signed = peek().is(".s64") && peek(1).is(')');
    if (to_signed || (peek().is(".u64") && peek(1).is(')'))) {
      take(), take();
      const Arg value = unary_expression();
      if (value.kind != Arg::integer)
        fail_at(token.line, "the operand of a cast must be an integer");
      return integer_constant(value.bits, !to_signed);
    }
    const Arg inner = conditional_expression();
    expect(')');
    return inner;
  }
  if (accept('+')) return unary_expression();
  if (accept('-')) {
    Arg value = unary_expression();
    if (value.kind == Arg::integer) return integer_constant(~value.bits + 1, value.text == "u");
    value.bits ^= 1ull << 63;
    if (value.text == "f") value.offset ^= 0x80000000;
    return value;
  }
  if (accept('~')) {
    const Arg value = unary_expression();
    if (value.kind != Arg::integer) fail_at(token.line, "the operand of '~' must be an integer");
    return integer_constant(~value.bits, value.text == "u");
  }
  if (accept('!')) return integer_constant(!is_nonzero(unary_expression()), false);
  fail_token("a number or an expression");
}

Arg TokenReader::combined(const std::string& op, const Arg& x, const Arg& y,
                          std::uint32_t line) const {
  if (is_exact(x) || is_exact(y))
    fail_at(line, "the operands of '" + op + "' must not be 0f and 0d constants");
  if (op == "&&") return integer_constant(is_nonzero(x) && is_nonzero(y), false);
  if (op == "||") return integer_constant(is_nonzero(x) || is_nonzero(y), false);
  if (x.kind == Arg::real || y.kind == Arg::real) {
    const double a = real_of(x), b = real_of(y);
    if (op == "+") return real_constant(a + b);
    if (op == "-") return real_constant(a - b);
    if (op == "*") return real_constant(a * b);
    if (op == "/") return real_constant(a / b);
    if (op == "<") return integer_constant(a < b, false);
    if (op == ">") return integer_constant(a > b, false);
    if (op == "<=") return integer_constant(a <= b, false);
    if (op == ">=") return integer_constant(a >= b, false);
    if (op == "==") return integer_constant(a == b, false);
    if (op == "!=") return integer_constant(a != b, false);
    fail_at(line, "the operands of '" + op + "' must be integers");
  }
  const std::uint64_t a = x.bits, b = y.bits;
  const auto sa = static_cast<std::int64_t>(a), sb = static_cast<std::int64_t>(b);
  if (op == "<<" || op == ">>") {
    const bool is_unsigned = x.text == "u";
    if (b > 63) fail_at(line, "a shift must be by 0 to 63 bits (got " + std::to_string(sb) + ")");
    if (op == "<<") return integer_constant(a << b, is_unsigned);
    return integer_constant(is_unsigned ? a >> b : static_cast<std::uint64_t>(sa >> b),
                            is_unsigned);
  }
  const bool is_unsigned = x.text == "u" || y.text == "u";
  if (op == "+") return integer_constant(a + b, is_unsigned);
  if (op == "-") return integer_constant(a - b, is_unsigned);
  if (op == "*") return integer_constant(a * b, is_unsigned);
  if (op == "&") return integer_constant(a & b, is_unsigned);
  if (op == "|") return integer_constant(a | b, is_unsigned);
  if (op == "^") return integer_constant(a ^ b, is_unsigned);
  if (op == "==") return integer_constant(a == b, false);
  if (op == "!=") return integer_constant(a != b, false);
  if (op == "<") return integer_constant(is_unsigned ? a < b : sa < sb, false);
  if (op == ">") return integer_constant(is_unsigned ? a > b : sa > sb, false);
  if (op == "<=") return integer_constant(is_unsigned ? a <= b : sa <= sb, false);
  if (op == ">=") return integer_constant(is_unsigned ? a >= b : sa >= sb, false);
  if (b == 0) fail_at(line, "a divisor must not be 0");
  const bool overflows = !is_unsigned && sb == -1;  // the smallest integer has no negation
  if (op == "/")
    return integer_constant(is_unsigned ? a / b
                            : overflows ? ~a + 1
                                        : static_cast<std::uint64_t>(sa / sb),
                            is_unsigned);
  return integer_constant(is_unsigned ? a % b
                          : overflows ? 0
                                      : static_cast<std::uint64_t>(sa % sb),
                          is_unsigned);
}

}  // namespace torchext::sim
