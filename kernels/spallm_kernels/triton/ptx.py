"""Generate the lookup in PTX: it turns packed codes and a table in registers into 16-bit weights.

A table of 16-bit entries is split into registers of low bytes and registers of high bytes, four
entries each. `prmt` picks four bytes from two registers by the low three bits of the nibbles of a
selector. So among eight entries, four low bytes cost one instruction and four high bytes another;
two more instructions interleave the halves. Nothing is read from memory, and float16 and bfloat16
work alike. Instructions of the integer pipe per weight: 2.6 at 4 bits, 2.1 at 3, 1.4 at 2.

A *unit* is the fewest whole words that hold whole codes: 8 codes in a word at 4 bits, 16 codes in a
word at 2 bits, 32 codes in three words at 3 bits.
"""

from __future__ import annotations

UNIT_CODES = {2: 16, 3: 32, 4: 8}
UNIT_WORDS = {2: 1, 3: 3, 4: 1}
#: The bytes that `one_hot` writes for a code that is the entry. Both come from the same byte, so
#: they are equal. As bfloat16 and float16 they are exactly these numbers.
_MARKS = "0x40404040"
BFLOAT16_MARK, FLOAT16_MARK = 3.0, 2.125


def byte_registers(bits: int) -> int:
    """Return how many registers hold a table: half of them low bytes, half high bytes."""
    return max(2, (1 << bits) // 2)


def split_table(bits: int) -> tuple[str, str]:
    """Return the assembly that splits a table into bytes, and its constraints.

    It takes 2^bits entries in bit-reversed order and writes `byte_registers(bits)` registers.
    """
    entries, registers = 1 << bits, byte_registers(bits)
    entry = [f"${registers + _reversed(number, bits)}" for number in range(entries)]
    lines = [".reg .b32 a, b;"]
    for quad in range(entries // 4):
        first, second, third, fourth = entry[4 * quad : 4 * quad + 4]
        lines += [
            f"mov.b32 a, {{{first}, {second}}};",
            f"mov.b32 b, {{{third}, {fourth}}};",
            f"prmt.b32 ${quad}, a, b, 0x6420;",
            f"prmt.b32 ${registers // 2 + quad}, a, b, 0x7531;",
        ]
    # Early clobber: outputs are written before all inputs have been read.
    return _block(lines), ",".join(["=&r"] * registers + ["h"] * entries)


def look_up(bits: int) -> tuple[str, str]:
    """Return the assembly that looks up the weights of a unit, and its constraints.

    It takes the words of the unit and a split table, and writes one weight per code.
    """
    codes, words, registers = UNIT_CODES[bits], UNIT_WORDS[bits], byte_registers(bits)
    word = [f"${codes + number}" for number in range(words)]
    table = [f"${codes + words + number}" for number in range(registers)]
    low, high = table[: registers // 2], table[registers // 2 :]
    body = {2: _two_bits, 3: _three_bits, 4: _four_bits}[bits](word, low, high)
    return _block(body), ",".join(["=&h"] * codes + ["r"] * (words + registers))


def one_hot(bits: int) -> tuple[str, str]:
    """Return the assembly that compares the codes of a unit with an entry, and its constraints.

    It takes the words of the unit and the number of the entry, repeated in every field of a word
    (of four bits for 3 bits), and writes a mark where they are equal, else
    zero (see BFLOAT16_MARK).
    """
    codes, words = UNIT_CODES[bits], UNIT_WORDS[bits]
    word, entry = [f"${codes + number}" for number in range(words)], f"${codes + words}"
    body = {2: _mark_two_bits, 3: _mark_three_bits, 4: _mark_four_bits}[bits](word, entry)
    return _block(body), ",".join(["=&h"] * codes + ["r"] * (words + 1))


def _mark_four_bits(word: list[str], entry: str) -> list[str]:
    lines = [".reg .b32 s, t, a, b, c;"]
    return [*lines, f"xor.b32 s, {word[0]}, {entry};", *_mark_nibbles(0)]


def _mark_three_bits(word: list[str], entry: str) -> list[str]:
    lines = [".reg .b32 s, t, a, b, c;"]
    for number in range(4):
        lines += [*_spread_eight(word, number), f"xor.b32 s, s, {entry};"]
        lines += _mark_nibbles(8 * number)
    return lines


def _mark_two_bits(word: list[str], entry: str) -> list[str]:
    lines = [
        ".reg .b32 s, t, a, b, c, d, e;",
        f"xor.b32 s, {word[0]}, {entry};",
        "shl.b32 t, s, 1;",
        "or.b32 s, s, t;",  # the upper bit of a field: whether the code is another
    ]
    for register, shift in zip(
        "abcd",
        ("shl.b32 t, s, 5;", "shl.b32 t, s, 3;", "shl.b32 t, s, 1;", "shr.u32 t, s, 1;"),
        strict=True,
    ):
        lines += [shift, f"lop3.b32 {register}, t, {_MARKS}, 0, {_NOT_AND};"]
    for byte in range(4):
        for number, pair in enumerate(("a, b", "c, d")):
            first = 4 * byte + 2 * number
            lines += _pair(pair, byte, first)
    return lines


def _mark_nibbles(first: int) -> list[str]:
    """Write the marks of eight codes, where the nibbles of s are zero."""
    lines = [
        "shl.b32 t, s, 1;",
        "or.b32 s, s, t;",
        "shl.b32 t, s, 2;",
        "or.b32 s, s, t;",  # the upper bit of a nibble: whether it is not zero
        "shl.b32 t, s, 3;",
        f"lop3.b32 a, t, {_MARKS}, 0, {_NOT_AND};",
        "shr.u32 t, s, 1;",
        f"lop3.b32 b, t, {_MARKS}, 0, {_NOT_AND};",
    ]
    for byte in range(4):
        lines += _pair("a, b", byte, first + 2 * byte)
    return lines


def _pair(registers: str, byte: int, first: int) -> list[str]:
    """Repeat a byte of each of two registers, and write both as neighbouring marks."""
    selector = f"0x{4 + byte}{4 + byte}{byte}{byte}"
    return [
        f"prmt.b32 t, {registers}, {selector};",
        f"mov.b32 {{${first}, ${first + 1}}}, t;",
    ]


def _four_bits(word: list[str], low: list[str], high: list[str]) -> list[str]:
    lines = [
        ".reg .b32 s, t, a, b, c, d;",
        f"and.b32 s, {word[0]}, 0x77777777;",  # the entry of eight, in each half of the table
        f"shr.u32 t, {word[0]}, 1;",
        # Select byte i (lower half), or byte 4 + i (upper half) if bit 3 of the code is set.
        f"lop3.b32 t, t, 0x44444444, 0x32103210, {_AND_OR};",
    ]
    for half in range(2):
        if half:
            lines += ["shr.u32 s, s, 16;", "shr.u32 t, t, 16;"]
        lines += [
            f"prmt.b32 a, {low[0]}, {low[1]}, s;",
            f"prmt.b32 b, {low[2]}, {low[3]}, s;",
            "prmt.b32 a, a, b, t;",
            f"prmt.b32 c, {high[0]}, {high[1]}, s;",
            f"prmt.b32 d, {high[2]}, {high[3]}, s;",
            "prmt.b32 c, c, d, t;",
            *_interleave(4 * half),
        ]
    return lines


def _three_bits(word: list[str], low: list[str], high: list[str]) -> list[str]:
    lines = [".reg .b32 s, t, a, b, c, d;"]
    for number in range(4):
        lines += _spread_eight(word, number)
        for half in range(2):
            if half:
                lines.append("shr.u32 s, s, 16;")
            lines += [
                f"prmt.b32 a, {low[0]}, {low[1]}, s;",
                f"prmt.b32 c, {high[0]}, {high[1]}, s;",
                *_interleave(8 * number + 4 * half),
            ]
    return lines


def _spread_eight(word: list[str], number: int) -> list[str]:
    """Write the codes 8 number to 8 number + 7 of a unit of 3 bits to the nibbles of s."""
    lines = [
        (  # 24 bits of the three words, from bit 0 of s on
            f"mov.b32 s, {word[0]};",
            f"shf.r.clamp.b32 s, {word[0]}, {word[1]}, 24;",
            f"shf.r.clamp.b32 s, {word[1]}, {word[2]}, 16;",
            f"shr.u32 s, {word[2]}, 8;",
        )[number]
    ]
    # First halves, then quarters, then eighths. Bits above the codes move with them and are removed
    # at the end.
    for shift, mask in ((4, "0x0000ffff"), (2, "0x00ff00ff"), (1, "0x0f0f0f0f")):
        lines += [f"shl.b32 t, s, {shift};", f"lop3.b32 s, s, t, {mask}, {_SELECT};"]
    return [*lines, "and.b32 s, s, 0x77777777;"]


def _two_bits(word: list[str], low: list[str], high: list[str]) -> list[str]:
    # Low and high bytes of four entries are eight bytes, so one permute gives two whole weights.
    # For each weight, its selector holds the nibbles code and code + 4.
    lines = [".reg .b32 s0, s1, s2, s3, a, b, c, d;"]
    for number in range(4):  # byte j of s<n> is code 4 j + n
        shifted = word[0] if number == 0 else f"s{number}"
        if number:
            lines.append(f"shr.u32 s{number}, {word[0]}, {2 * number};")
        lines += [
            f"and.b32 s{number}, {shifted}, 0x03030303;",
            f"mad.lo.u32 s{number}, s{number}, 0x11, 0x40404040;",
        ]
    for number, selector in enumerate("abcd"):
        pair = "s0, s1" if number < 2 else "s2, s3"  # codes 0 and 1 of a byte, codes 2 and 3
        lines.append(f"prmt.b32 {selector}, {pair}, {('0x5140', '0x7362')[number % 2]};")
    for number, selector in enumerate("abcd"):
        first = 8 * (number % 2) + 2 * (number // 2)
        for half in range(2):
            if half:
                lines.append(f"shr.u32 {selector}, {selector}, 16;")
            lines += [
                f"prmt.b32 s0, {low[0]}, {high[0]}, {selector};",
                f"mov.b32 {{${first + 4 * half}, ${first + 4 * half + 1}}}, s0;",
            ]
    return lines


_AND_OR = "0xea"  # lop3: the first operand and the second, or the third
_NOT_AND = "0x0c"  # lop3: the second operand where the first has no bit
_SELECT = "0xe4"  # lop3: the first operand where the third has a bit, else the second


def _interleave(first: int) -> list[str]:
    """Combine low bytes in a and high bytes in c into the weights `first` to `first` + 3."""
    return [
        "prmt.b32 b, a, c, 0x5140;",
        "prmt.b32 d, a, c, 0x7362;",
        f"mov.b32 {{${first}, ${first + 1}}}, b;",
        f"mov.b32 {{${first + 2}, ${first + 3}}}, d;",
    ]


def _reversed(number: int, bits: int) -> int:
    return int(f"{number:0{bits}b}"[::-1], 2)


def _block(lines: list[str]) -> str:
    return "{\n" + "\n".join(lines) + "\n}"
