"""An interpreter of PTX, as much of it as fastbn's kernels compile to: compiled kernels can be run without a GPU.

A kernel becomes a Python generator; a launch runs one of them for each thread. Barriers and shuffles yield, and go on
when all threads (of the block, of the warp) have come there: a thread that does not come, or a warp that has diverged,
is an error. So is an access that is misaligned, or outside of what was allocated. Registers and memory begin as junk.

A launch runs twice. Between two barriers (of threads of one warp: between two shuffles) the first thread goes as far as
it can, then the next; the second time all is in the opposite order, blocks too. Memory must end the same. So any two
accesses that nothing orders are tried in both orders, and a barrier that is missing shows where they collide.

Not modelled: time, caches, accesses of two blocks or warps in turns (one is done before the next begins), and the
second rounding that fma in float64 would save.
"""

import bisect
import re
import struct

import numpy as np

FORMATS = {"f32": "f", "f64": "d", "b16": "H", "u16": "H", "u32": "i", "b32": "i", "b64": "q", "u64": "q"}
JUNK = {"p": "False", "f": "F32(7e7)", "fd": "F64(7e77)"}  # of registers; others are integers
COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
WARP = 32


# ---- what the generated code calls ----

F32, F64 = np.float32, np.float64


def s16(v):
    return v & 0xFFFF  # 16-bit registers only ever hold bits


def s32(v):
    v &= 0xFFFFFFFF
    return v - (1 << 32) if v >> 31 else v


def s64(v):
    v &= 0xFFFFFFFFFFFFFFFF
    return v - (1 << 64) if v >> 63 else v


def half(bits):
    return np.uint16(bits & 0xFFFF).view(np.float16)


def half_bits(value):
    return int(np.float16(value).view(np.uint16))


def fma(a, b, c):
    """Of float32: the product is exact in float64."""
    return F32(F64(a) * F64(b) + F64(c))


def quotient(a, b):
    q = abs(a) // abs(b)
    return q if (a < 0) == (b < 0) else -q


def bits(v):
    return v if isinstance(v, int) else struct.unpack("<q", struct.pack("<d", float(v)))[0]


def from_bits(v):
    return F64(struct.unpack("<d", struct.pack("<q", s64(v)))[0])


def from_bits32(v):
    return F32(struct.unpack("<f", struct.pack("<I", v))[0])


class Memory:
    """Allocations at known addresses, with room between them that must not be touched."""

    def __init__(self, base):
        self.base, self.bytes, self.starts, self.ends = base, bytearray(), [], []

    def allocate(self, array, offset=0):
        """The address of a copy; `offset`: from a multiple of 256."""
        self.bytes += b"\xff" * (256 + offset)
        self.starts.append(self.base + len(self.bytes))
        self.bytes += np.ascontiguousarray(array).tobytes()
        self.ends.append(self.base + len(self.bytes))
        self.bytes += b"\xff" * (-len(self.bytes) % 256)
        return self.starts[-1]

    def array(self, address, dtype, shape):
        start = address - self.base
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.frombuffer(bytes(self.bytes[start : start + size]), dtype).reshape(shape)

    def _place(self, address, size):
        i = bisect.bisect_right(self.starts, address) - 1
        assert i >= 0 and address + size <= self.ends[i], f"{size} bytes at {address - self.base} are not allocated"
        assert address % size == 0, f"{size} bytes at {address - self.base} are misaligned"
        return address - self.base

    def read(self, address, form, count):
        place = self._place(address, struct.calcsize(form) * count)
        return struct.unpack_from(f"<{count}{form}", self.bytes, place)

    def write(self, address, form, *values):
        place = self._place(address, struct.calcsize(form) * len(values))
        struct.pack_into(f"<{len(values)}{form}", self.bytes, place, *values)


# ---- a kernel ----


class Kernel:
    """PTX of one kernel, as a generator function in Python."""

    def __init__(self, text):
        self.shared, self.shared_size = {}, 0
        for name, size in re.findall(r"\.shared \.align \d+ \.b8 (\w+)\[(\d+)\];", text):
            self.shared[name] = self.shared_size
            self.shared_size += -(-int(size) // 16) * 16
        head, body = text[text.index(".visible .entry") :].split("{", 1)
        self.parameters = re.findall(r"\.param \.\w+ (\w+)", head)
        blocks, self.labels = [[]], {}
        for line in body.rsplit("}", 1)[0].splitlines():
            line = line.split("//")[0].strip()
            if line.endswith(":"):
                blocks.append([])
                self.labels[line[:-1]] = len(blocks) - 1
            elif line and not line.startswith("."):
                for part in line.split(";"):
                    part = part.strip()
                    if part.startswith("{ ") or part in ("{", "}"):  # a scope
                        part = part[1:].strip()
                    if part and not part.startswith(".reg"):
                        blocks[-1].append(part)
                        if re.search(r"\b(bra|ret)\b", part):
                            blocks.append([])
        code = [
            [*(line for text in block for line in self._line(text)), f"pc = {i + 1}", "continue"]
            for i, block in enumerate(blocks)
        ]
        registers = sorted(set(re.findall(r"%((?:p|f|fd|r|rd|rs|h|hh)\d+)", body)))
        lines = ["def thread(P, G, S, tid, ctaid, ntid, nctaid):", " temp = pc = 0"]
        lines += [f" {r} = {JUNK.get(r.rstrip('0123456789'), 123456789)}" for r in registers]
        lines += [" while True:", *self._search([*code, ["return"]], 0, len(code) + 1, 2), " yield"]
        self.source = "\n".join(lines)
        names = dict(globals())
        exec(compile(self.source, "ptx", "exec"), names)
        self.thread = names["thread"]

    def _search(self, code, low, high, indent):
        if high - low == 1:
            return [" " * indent + line for line in code[low]]
        middle = (low + high) // 2
        return [
            *(" " * indent + f"if pc < {middle}:", *self._search(code, low, middle, indent + 1)),
            *(" " * indent + "else:", *self._search(code, middle, high, indent + 1)),
        ]

    def _operand(self, text):
        text = text.strip()
        special = {"%tid.x": "tid", "%ctaid.x": "ctaid", "%ntid.x": "ntid", "%nctaid.x": "nctaid"}
        if text in special or text.startswith("%"):
            return special.get(text, text[1:])
        if text.startswith("0d"):
            return f"from_bits({int(text[2:], 16)})"
        if text.startswith("0f"):
            return f"from_bits32({int(text[2:], 16)})"
        return f"({self.shared[text] + SHARED})" if text in self.shared else f"({text})"

    def _operands(self, text):
        return [self._operand(part) for part in re.split(r"[,|]", text) if part.strip()]

    def _line(self, text):
        """Python for an instruction."""
        guarded = re.match(r"@(!?)%(p\d+)\s+(.*)", text)
        if guarded:
            return [f"if {'not ' * bool(guarded[1])}{guarded[2]}:", *(" " + line for line in self._line(guarded[3]))]
        opcode, _, rest = text.replace("\t", " ").partition(" ")
        rest = rest.strip()
        parts = opcode.split(".")
        kind, of = parts[0], parts[-1]
        if kind == "bra":
            return [f"pc = {self.labels[rest]}", "continue"]
        if kind == "ret":
            return ["return"]
        if kind in ("ld", "st"):
            return self._access(kind, parts, rest)
        if kind == "mov" and "{" in rest:
            return self._pieces(of, rest)
        a = self._operands(rest)
        if opcode == "bar.sync":
            return ["yield ('bar',)"]
        if opcode == "bar.red.or.pred":
            return [f"{a[0]} = yield ('or', {a[2]})"]
        if opcode == "shfl.sync.down.b32":
            return [f"{a[0]} = yield ('shfl', {a[2]}, {a[3]}, {a[4]})"]
        if kind == "setp":
            return [f"{a[0]} = {self._comparison(parts[1], of, a[1], a[2])}"]
        return [f"{a[0]} = {self._value(opcode, kind, parts, of, a)}"]

    def _access(self, kind, parts, rest):
        inside = re.search(r"\[([^\]]+)\]", rest)[1]
        if parts[1] == "param":
            return [f"{self._operand(rest.split(',')[0])} = P[{self.parameters.index(inside)}]"]
        base, _, offset = inside.partition("+")
        address, memory = f"{self._operand(base)} + ({offset or 0})", "G" if parts[1] == "global" else "S"
        several = re.search(r"\{([^}]*)\}", rest)
        names = several[1] if several else rest.split(",")[0] if kind == "ld" else rest.rsplit(",", 1)[1]
        registers, form = self._operands(names), FORMATS[parts[-1]]
        assert len(registers) == (int(parts[2][1:]) if parts[2].startswith("v") else 1)
        if kind == "ld":
            convert = {"f": "F32", "d": "F64"}.get(form, "")
            found = [f"{r} = {convert}(temp[{i}])" for i, r in enumerate(registers)]
            return [f"temp = {memory}.read({address}, '{form}', {len(registers)})", *found]
        convert = {"f": "float", "d": "float", "H": "s16", "i": "s32", "q": "s64"}[form]
        values = ", ".join(f"{convert}({r})" for r in registers)
        return [f"{memory}.write({address}, '{form}', {values})"]

    def _pieces(self, of, rest):
        """A register taken apart into two, or made of two."""
        width = 16 if of == "b32" else 32
        apart = re.match(r"\{([^}]*)\}\s*,(.*)", rest)
        if apart:
            source = f"bits({self._operand(apart[2])})"
            names = ["temp" if n.strip() == "%temp" else self._operand(n) for n in apart[1].split(",")]
            return [f"({', '.join(names)},) = ({', '.join(f's{width}({source} >> {width * i})' for i in range(2))})"]
        target, made = re.match(r"(.*?),\s*\{([^}]*)\}", rest).groups()
        low, high = (f"({self._operand(part)} & {(1 << width) - 1})" for part in made.split(","))
        target = self._operand(target)
        convert = "from_bits" if target.startswith("fd") else f"s{2 * width}"
        return [f"{target} = {convert}({low} | {high} << {width})"]

    def _comparison(self, how, of, x, y):
        if of == "f16":
            x, y = f"half({x})", f"half({y})"
        elif of[0] == "u":
            mask = (1 << int(of[1:])) - 1
            x, y = f"({x} & {mask})", f"({y} & {mask})"
        if how in COMPARE:
            also = f" and {x} == {x} and {y} == {y}" if how == "ne" and of[0] == "f" else ""
            return f"bool({x} {COMPARE[how]} {y}{also})"
        return f"bool({x} {COMPARE[how[:-1]]} {y} or {x} != {x} or {y} != {y})"  # or unordered

    def _value(self, opcode, kind, parts, of, a):
        floating = of in ("f32", "f64")
        width = 64 if "64" in of else 32
        wrap, mask = f"s{width}", (1 << width) - 1
        if kind == "mov":
            if of == "b64" and a[0].startswith("fd") != a[1].startswith("fd"):
                return f"{'from_bits' if a[0].startswith('fd') else 'bits'}({a[1]})"
            return f"bool({a[1]})" if of == "pred" else a[1]
        if kind == "cvt":
            return self._conversion(parts[-2], of, a[1])
        if kind == "selp":
            return f"{a[1]} if {a[3]} else {a[2]}"
        if of == "pred":
            return f"not {a[1]}" if kind == "not" else f"{a[1]} {'!=' if kind == 'xor' else kind} {a[2]}"
        if kind == "fma":
            return f"fma({a[1]}, {a[2]}, {a[3]})" if of == "f32" else f"{a[1]} * {a[2]} + {a[3]}"
        if kind in ("add", "sub", "mul", "div") and floating:
            return f"{a[1]} {dict(add='+', sub='-', mul='*', div='/')[kind]} {a[2]}"
        if opcode == "mul.wide.u32":
            return f"s64(({a[1]} & 0xFFFFFFFF) * ({a[2]} & 0xFFFFFFFF))"
        if opcode == "mul.wide.s32":
            return f"s64({a[1]} * {a[2]})"
        if kind in ("div", "rem"):
            if of[0] == "u":
                return f"{wrap}(({a[1]} & {mask}) {'//' if kind == 'div' else '%'} ({a[2]} & {mask}))"
            return f"quotient({a[1]}, {a[2]})" if kind == "div" else f"{a[1]} - {a[2]} * quotient({a[1]}, {a[2]})"
        if kind == "shr" and of[0] == "u":
            return f"{wrap}(({a[1]} & {mask}) >> {a[2]})"
        forms = {
            "add": "{w}({1} + {2})", "sub": "{w}({1} - {2})", "mul": "{w}({1} * {2})", "mad": "{w}({1} * {2} + {3})",
            "and": "{w}({1} & {2})", "or": "{w}({1} | {2})", "xor": "{w}({1} ^ {2})", "not": "~{1}",
            "shl": "{w}({1} << {2})", "shr": "{1} >> {2}", "min": "min({1}, {2})", "max": "max({1}, {2})",
            "abs": "abs({1})", "neg": "-{1}", "sqrt": "np.sqrt({1})",
            "copysign": "np.copysign({2}, {1})",  # the first gives the sign
            "bfi": "{w}({2} & ~(((1 << {4}) - 1) << {3}) | ({1} & ((1 << {4}) - 1)) << {3})",
        }  # fmt: skip
        return forms[kind].format(*a, w=wrap)

    def _conversion(self, to, of, value):
        number = {"f32": "F32", "f64": "F64"}
        if of == "f16":
            return f"{number[to]}(half({value}))"
        if to == "f16":
            return f"half_bits({value})"
        if to in number:
            return f"{number[to]}({value})"
        unsigned = f" & {(1 << int(of[1:])) - 1}" if of[0] == "u" else ""
        return f"s{to[1:]}({value}{unsigned})"

    def launch(self, memory, blocks, threads, parameters):
        """Run it: one block after the other; and again from the same memory, in the opposite order."""
        assert len(parameters) == len(self.parameters)
        before, after = bytes(memory.bytes), []
        with np.errstate(all="ignore"):
            for turn in (-1, 1):
                memory.bytes[:] = before
                for block in range(blocks)[::turn]:
                    shared = Memory(SHARED)
                    shared.bytes = bytearray(b"\xff" * self.shared_size)
                    shared.starts, shared.ends = [SHARED], [SHARED + self.shared_size]
                    running = {
                        t: self.thread(parameters, memory, shared, t, block, threads, blocks) for t in range(threads)
                    }
                    _run(running, threads, turn)
                after.append(bytes(memory.bytes))
        assert after[0] == after[1], "the result depends on the order of threads or blocks: a barrier is missing"


SHARED = 1 << 20  # where a block's shared memory is


def _run(running, threads, turn):
    """Between two barriers each warp goes as far as it can before the next one begins: forwards, or backwards."""
    answers = dict.fromkeys(running)
    while running:
        waiting = {}
        for first in range(0, threads, WARP)[::turn]:
            warp = [t for t in range(first, first + WARP)[::turn] if t in running]
            while warp:
                for t in warp:
                    try:
                        waiting[t] = running[t].send(answers[t])
                    except StopIteration:
                        del running[t]
                        waiting.pop(t, None)
                warp = [t for t in warp if t in running]
                if not all(waiting[t][0] == "shfl" for t in warp):
                    break
                assert len(warp) in (0, WARP), "a shuffle without all of its warp"
                for t in warp:
                    _, value, step, _ = waiting[t]
                    answers[t] = waiting[t + step][1] if t - first + step < WARP else value
        if running:
            assert len(running) == threads, "a barrier that some threads do not come to"
            kinds = {waiting[t][0] for t in running}
            assert kinds in ({"bar"}, {"or"}), f"threads that wait for different things: {kinds}"
            answers = dict.fromkeys(running, kinds == {"or"} and any(waiting[t][1] for t in running))
