"""Conventions by class: for every kind of answer, what says the same and what only looks like it."""

import pytest

from kpo_cli.rewards import grade_batch

# (gold, content of the box) by class: what must be accepted, and what must be refused.
CLASSES = {
    "upright letters": (
        [
            ("2+3i", "2+3\\mathrm{i}"), ("1-5\\mathrm{i}", "1-5i"), ("2e", "2\\mathrm{e}"), ("3\\text{ m}", "3"),
            ("\\frac{\\sqrt{2}}{2}\\mathrm{i}", "\\frac{i}{\\sqrt{2}}"), ("e^{2}", "\\mathrm{e}^2"),
        ],
        [
            ("1-5\\mathrm{i}", "-4"), ("-4", "1-5\\mathrm{i}"), ("2", "2\\mathrm{e}"), ("3", "3\\operatorname{i}"),
            ("5", "5\\text{i}"), ("7", "7\\mathrm{x}"), ("\\sqrt{2}", "\\sqrt{2}\\,\\mathrm{i}"),
        ],
    ),
    "function names": (
        [
            ("\\frac{e+e^{-1}}{2}", "\\operatorname{cosh}(1)"), ("\\frac{\\pi}{4}", "\\mathrm{arctan}(1)"),
            ("2", "\\operatorname{gcd}(4,6)"), ("12", "\\text{lcm}(4,6)"), ("7", "\\max(3,7)"),
            ("-1", "\\mathrm{sgn}(-5)"), ("3", "\\min\\{3,7\\}"), ("105", "7!!"), ("0", "\\sinh 0"),
            ("5", "\\det\\begin{pmatrix}2&1\\\\1&3\\end{pmatrix}"),
        ],
        [
            ("1", "\\operatorname{cosh}(1)"), ("1", "\\mathrm{erf}(1)"), ("(1,2)", "\\operatorname{lcm}(1,2)"),
            ("3", "\\text{floor}(3.5)+1"), ("4", "\\operatorname{foo}(4)"), ("4", "\\text{gcd}(4,6)"), ("5040", "7!!"),
            ("2", "\\det 2"), ("1", "\\sin(1)"),
        ],
    ),
    "bases": (
        [
            ("1011_2", "(1011)_2"), ("1011_2", "1011_{\\text{two}}"), ("2A_{16}", "2A_{16}"), ("204_5", "204"),
            ("204", "204_{10}"), ("5", "5_6"),
        ],
        [
            ("a_1", "a"), ("a", "a_1"), ("A_2", "A"), ("b_{16}", "b"), ("a_1", "a_2"), ("x_{10}", "x"),
            ("204_5", "204_6"), ("204", "204_5"), ("101", "101_{\\text{two}}"), ("5", "101_2"),
        ],
    ),
    "brackets that may be the integer part": (
        [("3", "[3]"), ("[x]", "[x]"), ("-3", "[-3]"), ("2(x+1)", "2[x+1]"), ("[2x]", "[x+x]")],
        [("[x]", "x"), ("x", "[x]"), ("\\frac{7}{2}", "[\\frac{7}{2}]"), ("[x+y]", "x+y")],
    ),
    "orders of capitals": (
        [("BCA", "BCA"), ("xy", "yx"), ("BCA", "\\text{BCA}"), ("ABCD", "A B C D")],
        [("BCA", "ABC"), ("\\text{BCA}", "ACB"), ("PQR", "PRQ")],
    ),
    "counted things": (
        [
            ("18", "18 eggs"), ("42", "42 dollars"), ("18", "18 eggs per day"), ("5", "5^{th}"),
            ("21", "21^{\\text{st}}"), ("\\sqrt{5}", "\\mathrm{sqrt}(5)"), ("5", "5 \\text{ for all } x"),
        ],
        [
            ("5", "5 squared"), ("5", "5 dozen"), ("5", "5 eggs or six"), ("5", "5 less than x"), ("18", "19 eggs"),
            ("5", "5 abc"), ("5", "\\mathrm{sqrt}(5)"), ("5", "\\text{sqrt }5"), ("5", "\\text{a multiple of }5"),
            ("5", "5\\text{ with probability }1/2"), ("5", "5\\text{ is wrong}"), ("5", "x^{5^{th}}"), ("5", "5^{t}"),
        ],
    ),
    "several equations": (
        [
            ("x=1,y=2", "x=1\\quad y=2"), ("x=1,y=2", "x=1 \\\\ y=2"), ("7", "x = 3+4 = 7"),
            ("12", "A = \\frac12 bh = 12"), ("x=1,y=2", "x=1 \\text{ and } y=2"), ("7", "x = 7 \\approx 7.0"),
        ],
        [
            ("2", "x=1\\quad y=2"), ("2", "x=1 y=2"), ("2", "x=1\\; y=2"), ("2", "x=1\\\\y=2"), ("2", "x=1, y=2"),
            ("3", "x=2=3"), ("2", "x=1 \\text{ and } y=2"), ("2", "x=1 \\text{ or } x=2"), ("5", "1+1=3=5"),
        ],
    ),
    "words that change a value": (
        [
            ("-5", "\\text{negative }5"), ("-5", "\\text{minus 5}"), ("5000000", "5\\text{ million}"),
            ("24", "2\\text{ dozen}"), ("3{,}000", "3 \\text{ thousand dollars}"), ("5", "\\text{The answer is }5"),
            ("5", "5\\text{ apples}"), ("5", "\\text{5 apples}"), ("1.2\\text{ billion}", "1200000000"),
            ("\\text{not 5}", "\\text{Not 5}"), ("5,6", "5\\text{ or 6}"),
            ("\\text{at least }5", "\\text{at least 5}"),
        ],
        [
            ("5", "\\text{negative }5"), ("5", "\\text{minus 5}"), ("5", "\\text{not }5"), ("5", "5\\text{ million}"),
            ("5", "5\\text{ or 6}"), ("5", "5\\text{ dozen}"), ("5", "\\text{at least }5"),
            ("5", "\\text{more than }5"), ("5", "5\\text{ hundred}"), ("5", "\\text{either }5"),
            ("6", "5\\text{ or 6}"), ("5", "5 \\text{ squared}"), ("5", "\\text{half of }5"),
            ("5", "\\text{anything but }5"), ("5", "5 \\text{ factorial}"), ("5", "5 \\text{ (or more)}"),
            ("5", "5 \\text{ if } x>0"), ("5", "\\text{isn't }5"), ("5", "5\\text{ and a half}"),
            ("5", "\\text{the square root of }5"), ("5", "5\\text{ to }6"), ("5", "5\\text{ plus }6"),
            ("5", "\\text{between }5\\text{ and }7"), ("5", "\\text{the inverse of }5"),
        ],
    ),
    "signs in sentences": (
        [
            ("\\text{the slope is }-5", "\\text{the slope is -5}"), ("-5", "\\text{the slope is -5}"),
            ("-5", "\\text{The slope is } -5."),
        ],
        [
            ("5", "\\text{the slope is -5}"), ("\\text{the slope is -5}", "\\text{the slope is 5}"),
            ("\\text{x = -3}", "\\text{x = 3}"), ("\\text{1.5 cups}", "\\text{15 cups}"),
            ("\\text{3/4 cup}", "\\text{34 cup}"), ("-5", "\\text{the slope is 5}"),
            ("\\text{x > 3}", "\\text{x < 3}"),
        ],
    ),
    "infinity": (
        [
            ("\\infty", "+\\infty"), ("-\\infty", "-\\infty"), ("(-\\infty, \\infty)", "\\mathbb{R}"),
        ],
        [
            ("0", "\\infty-\\infty"), ("1", "\\frac{\\infty}{\\infty}"), ("0", "\\frac{1}{\\infty}"),
            ("\\infty", "-\\infty"), ("0", "0\\cdot\\infty"), ("\\infty", "\\infty+x"), ("1", "1^{\\infty}"),
            ("0", "\\infty - (\\infty + 0)"),
        ],
    ),
    "units": (
        [
            ("5 \\text{ seconds}", "5"), ("5", "5\\text{ min}"), ("24 \\text{ cm}", "\\text{24 cm}"), ("12", "12\""),
            ("12\\text{ inches}", "12''"), ("2\\text{ minutes}", "120\\text{ seconds}"),
            ("2.5\\text{ km}", "2500\\text{ m}"), ("15\\text{ cm}^2", "15\\text{ square centimeters}"),
            ("10\\text{ m/s}", "36\\frac{\\text{km}}{\\text{h}}"), ("5\\text{ metres}", "5\\text{ m}"),
            ("90^\\circ", "90 \\text{ deg}"), ("5", "5\\ \\mathrm{kg}"), ("5 \\text{ см}", "5"), ("3", "3\\text{厘米}"),
        ],
        [
            ("5 \\text{ seconds}", "5\\text{ minutes}"), ("5\\text{ m}", "5\\text{ cm}"),
            ("5\\text{ kg}", "5\\text{ g}"), ("5\\text{ dollars}", "5\\text{ cents}"),
            ("5\\text{ hours}", "5\\text{ days}"), ("10\\text{ m/s}", "10\\text{ km/h}"),
            ("\\text{24 cm}", "\\text{24 mm}"), ("24", "\\text{25 cm}"), ("2\\text{ ft}", "2\\text{ in}"),
            ("90^\\circ", "90\\text{ radians}"), ("12\\text{ cm}^2", "12\\text{ m}^2"),
        ],
    ),
    "times of day": (
        [
            ("3{:}30\\text{ p.m.}", "3:30 \\text{ PM}"), ("3:30\\text{ p.m.}", "15:30"), ("3:30\\text{ pm}", "3:30"),
            ("9\\text{ a.m.}", "9:00 a.m."), ("12:00\\text{ a.m.}", "12:00 am"),
        ],
        [
            ("3:30\\text{ p.m.}", "3:30\\text{ a.m.}"), ("3:30\\text{ pm}", "4:30\\text{ pm}"),
            ("9\\text{ a.m.}", "9\\text{ p.m.}"), ("4:00\\text{ pm}", "2:00"), ("9:00\\text{ a.m.}", "21:00"),
            ("12:00\\text{ am}", "12:00\\text{ pm}"),
        ],
    ),
    "zeros": (
        [
            ("0", "\\sin\\pi"), ("0", "\\cos\\frac{\\pi}{2}"), ("0", "\\sqrt{2}\\cdot\\sqrt{3}-\\sqrt{6}"),
            ("0", "e^{i\\pi}+1"), ("0", "\\ln 1"), ("0", "\\tan\\pi"), ("(0,1)", "(\\sin\\pi,1)"),
            ("0", "\\sqrt{3+2\\sqrt2}-1-\\sqrt2"), ("0", "(x+1)^2-x^2-2x-1"), ("x=0", "x=\\sin 2\\pi"),
            ("1", "1+\\sin\\pi"), ("0", "\\log_2 1"),
        ],
        [
            ("0", "10^{-400}"), ("0", "e^{-1000}"), ("0", "\\sin(\\pi+10^{-50})"), ("0", "1+10^{-60}-1"),
            ("0", "\\sqrt{2+10^{-200}}-\\sqrt{2}"), ("1", "1+10^{-301}"), ("1", "1+e^{-700}"),
            ("\\sqrt2", "\\sqrt{2}+10^{-100}"), ("0", "10^{-400}x"), ("x", "x+10^{-70}"),
        ],
    ),
    "no code": (
        [
            ("\\xi", "\\xi"), ("\\frac{\\xi}{2}", "\\xi/2"), ("\\xi+\\eta", "\\eta+\\xi"),
            ("5", "5 \\text{ for all } x"), ("\\text{9 a.m.}", "\\text{9 A.M.}"),
        ],
        [
            ("\\xi", "\\eta"), ("7", "7 # 8"), ("7", "7 if 1 else 8"), ("1", "`1`+1"), ("7", "7 @ 8"),
        ],
    ),
    "names": (
        [
            ("\\frac12", "e=\\frac{1}{2}"), ("e=\\frac12", "0.5"), ("5", "i=5"), ("f(x)=x", "f(n)=n"),
            ("f(x)=2x+1", "f(t)=1+2t"), ("f(x,y)=x-y", "f(a,b)=a-b"), ("f(x)=x^2 \\text{ for all } x", "f(x)=x^2"),
            ("f(n)=n", "f(n)=n \\text{ for all positive integers } n"),
        ],
        [
            ("f(x)=x", "g(x)=x"), ("f(n)=an", "f(a)=a^2"), ("f(x)=x", "f(x)=y"), ("f(x,y)=x-y", "f(y,x)=x-y"),
            ("2", "e=3"), ("f(x)=x", "f(2)=2"), ("f(x)=x", "f(x)=x, f(x)=0"), ("2x", "2n"),
        ],
    ),
    "conditions": (
        [
            ("(2,5)", "x>2\\text{ and }x<5"), ("2<x<5", "x<5 \\text{ and } x>2"),
            ("(-\\infty,1)\\cup(3,\\infty)", "x<1\\text{ or }x>3"), ("(2,5]", "x>2, x\\le5"),
            ("x<1 \\text{ or } x>3", "x<1, x>3"), ("(-\\infty,0)\\cup(0,\\infty)", "x\\neq0"),
            ("[1,3]", "[1,2]\\cup[2,3]"), ("(1,\\sqrt{10})", "1<x<\\sqrt{10}"),
            ("(-\\infty,2)\\cup(2,\\infty)", "\\mathbb{R}\\setminus\\{2\\}"), ("(0,1)", "\\left]0,1\\right["),
            ("[0,1)", "[0;1["), ("(0,2)", "(0,1]\\cup[1,2)"), ("(a,b)", "a<x<b"), ("[2,\\infty)", "x \\ge 2"),
            ("(2,\\infty)", "2<x"), ("[1,2]", "[0,2]\\cap[1,3]"), ("[-1,1]", "|x|\\le 1"),
        ],
        [
            ("(2,5)", "x>2\\text{ or }x<5"), ("(2,5)", "x\\ge2\\text{ and }x<5"),
            ("(-\\infty,1)\\cup(3,\\infty)", "x<1\\text{ and }x>3"), ("(2,5)", "x>2"), ("[1,3]", "[1,2)\\cup(2,3]"),
            ("(2,5)", "x>2 \\text{ and } y<5"), ("[0,1]", "]0,1["), ("x>2", "x<2"), ("[1,2]", "[0,2]\\cup[1,3]"),
            ("(2,5)", "(5,2)"), ("\\mathbb{R}", "(0,\\infty)"),
        ],
    ),
    "set builders": (
        [
            ("(2,\\infty)", "\\{x \\mid x>2\\}"), ("\\{x\\mid -1<x<3\\}", "(-1,3)"),
            ("\\{x : x \\neq 3\\}", "\\mathbb{R}\\setminus\\{3\\}"),
            ("\\{x\\in\\mathbb{R} \\mid x\\ge 1\\}", "[1,\\infty)"),
            ("\\{x | x<1 \\text{ or } x>3\\}", "x<1\\text{ or }x>3"), ("\\{t \\mid t>2\\}", "\\{x | x>2\\}"),
            ("\\{x\\mid x>2, x\\in\\mathbb{R}\\}", "(2,\\infty)"),
        ],
        [
            ("(2,\\infty)", "\\{x \\mid x\\ge2\\}"), ("\\{x\\in\\mathbb{Z} \\mid x>2\\}", "(2,\\infty)"),
            ("2", "\\{x\\mid x>2\\}"), ("\\{x \\mid x>2\\}", "\\{x\\mid x>3\\}"),
            ("\\{x\\mid x<1\\text{ or }x>3\\}", "(1,3)"),
        ],
    ),
    "binomials": (
        [
            ("120", "{10\\choose3}"), ("\\binom{n}{2}", "{n \\choose 2}"), ("120", "{10 \\choose 7}"),
            ("{10\\choose3}", "\\binom{10}{3}"), ("120", "{}_{10}C_3"), ("120", "C_{10}^{3}"), ("120", "{}^{10}C_{3}"),
            ("\\frac{1}{2}", "{1\\over 2}"), ("120", "C(10,3)"),
        ],
        [
            ("\\frac{10}{3}", "{10\\choose3}"), ("\\binom{10}{3}", "\\frac{10}{3}"),
            ("\\binom{10}{3}", "{3\\choose10}"), ("120", "{10\\choose 4}"), ("103", "{10\\choose3}"),
            ("2", "{1\\over 2}"),
        ],
    ),
    "decimals": (
        [
            ("\\frac{2}{11}", "0.\\dot1\\dot8"), ("\\frac16", "0.1\\dot{6}"), ("\\frac17", "0.\\dot14285\\dot7"),
            ("\\frac13", "0.333\\ldots"), ("\\frac{2}{11}", "0.\\overline{18}"), ("3.14", "3,14"), ("0.5", "0,5"),
            ("\\frac14", "0,25"), ("3.14", "3{,}14"), ("1000", "1 000"), ("12345678", "12 345 678"),
            ("1000000", "1\\,000\\,000"), ("1234.5", "1 234,5"), ("-2.5", "-2,5"), ("(1.5, 2)", "(1{,}5; 2)"),
            ("\\frac{2}{11}", "0.1818\\dots"), ("1{,}234", "1234"),
        ],
        [
            ("\\frac{18}{100}", "0.\\dot1\\dot8"), ("0.18", "0.\\dot1\\dot8"), ("3.14", "3,41"), ("3,14", "3,41"),
            ("1.234", "1,234"), ("1000", "1 001"), ("1000", "1 00"), ("100", "1 000"), ("1,2", "2.1"),
            ("\\frac13", "0.33"), ("3.5", "3, 5"), ("1.5", "1.\\dot5"), ("2", "1 2"), ("\\frac13", "0.3\\ldots4"),
        ],
    ),
    "words": (
        [
            ("Yes", "yes"), ("true", "True"), ("\\text{East}", "east"), ("East", "\\text{EAST}"), ("Alice", "alice"),
            ("no", "No"), ("\\text{No}", "no"), ("odd", "Odd"), ("\\text{even}", "\\textbf{Even}"), ("TRUE", "true"),
            ("Bob", "bob"), ("\\text{Red and Blue}", "red and blue"), ("North East", "north east"),
            ("Monday.", "monday"), ("odd $n$", "n \\text{ odd}"), ("n \\text{ is odd}", "\\text{odd } n"),
        ],
        [
            ("AB", "ab"), ("ABC", "abc"), ("x", "X"), ("ABCD", "abcd"), ("Yes", "no"), ("east", "seat"),
            ("true", "false"), ("\\text{listen}", "silent"), ("Rr", "rr"), ("\\text{odd } n", "\\text{even } n"),
            ("yes", "\\text{not yes}"), ("\\text{East}", "\\text{South East}"), ("odd", "\\text{not odd}"),
            ("pV", "Pv"),
        ],
    ),
    "letters and values": (
        [
            ("12", "\\textbf{(C)}\\ 12"), ("C", "\\textbf{(C)}\\ 12"), ("\\text{(C)}", "C"),
            ("B", "\\textbf{(B) }\\frac12"), ("C", "C. 12"), ("C", "\\text{C: } 12"),
        ],
        [
            ("C", "\\textbf{(D)}\\ 12"), ("13", "\\textbf{(C)}\\ 12"), ("A", "\\text{A, B}"), ("A", "\\text{A or B}"),
            ("C", "(c)x"), ("A", "AB"),
        ],
    ),
    "congruences": (
        [
            ("3", "3 \\pmod{7}"), ("3 \\pmod 7", "10 \\pmod{7}"), ("x\\equiv 3\\pmod 7", "3 \\bmod 7"),
            ("1,4 \\pmod 5", "1, 4"), ("3\\pmod{7}", "x \\equiv 3 \\pmod{7}"),
        ],
        [
            ("3\\pmod{7}", "4\\pmod 7"), ("3\\pmod{7}", "3\\pmod 8"), ("3", "10 \\pmod 7"), ("4", "3\\pmod{7}"),
        ],
    ),
    "families": (
        [
            ("x=\\frac{\\pi}{4}+k\\pi, k\\in\\mathbb{Z}", "\\frac{\\pi}{4}+n\\pi, n \\in \\mathbb{Z}"),
            ("2k\\pi, k\\in\\mathbb{Z}", "2\\pi m, m\\in\\mathbb Z"),
            ("\\frac{\\pi}{4}+k\\pi, k\\in\\mathbb{Z}", "-\\frac{3\\pi}{4}+k\\pi, k \\in \\mathbb{Z}"),
            ("2k+1, k\\in\\mathbb{Z}", "2k-1, k\\in\\mathbb{Z}"),
        ],
        [
            ("\\frac{\\pi}{4}+k\\pi, k\\in\\mathbb{Z}", "\\frac{\\pi}{4}+2k\\pi, k\\in\\mathbb{Z}"),
            ("2k\\pi, k\\in\\mathbb{Z}", "k\\pi, k\\in\\mathbb{Z}"),
            ("2k+1, k\\in\\mathbb{Z}", "2k, k\\in\\mathbb{Z}"),
            ("\\frac{\\pi}{4}+k\\pi, k\\in\\mathbb{Z}", "\\frac{\\pi}{4}"),
        ],
    ),
    "sums and limits": (
        [
            ("5050", "\\sum_{k=1}^{100} k"), ("\\frac{\\pi^2}{6}", "\\sum_{n=1}^{\\infty} \\frac{1}{n^2}"),
            ("24", "\\prod_{k=1}^4 k"), ("\\frac13", "\\int_0^1 x^2 dx"), ("1", "\\lim_{x\\to 0} \\frac{\\sin x}{x}"),
            ("e", "\\lim_{n\\to\\infty}(1+\\frac1n)^n"), ("e", "\\sum_{k=0}^{\\infty}\\frac{1}{k!}"),
            ("\\frac{n(n+1)}{2}", "\\sum_{k=1}^n k"), ("2", "\\int_0^\\pi \\sin x \\, dx"),
            ("\\sum_{k=1}^{10} k^2", "385"), ("2", "\\sum_{k=0}^\\infty 2^{-k}"),
            ("\\sqrt{\\pi}", "\\int_{-\\infty}^{\\infty} e^{-x^2} dx"),
        ],
        [
            ("5050", "\\sum_{k=1}^{99} k"), ("\\frac13", "\\int_0^1 x^3 dx"),
            ("0", "\\lim_{x\\to 0} \\frac{\\sin x}{x}"), ("1", "\\sum_{n=1}^{\\infty}\\frac{1}{n}"),
            ("24", "\\prod_{k=1}^5 k"), ("e", "\\lim_{n\\to\\infty}(1+\\frac1n)^{2n}"), ("3", "\\int_0^3 dy \\cdot x"),
            ("0", "\\sum_{k=1}^{\\infty}(-1)^k"), ("0", "\\int_{0}^{1}\\frac{1}{x}dx"),
            ("0", "\\lim_{x\\to\\infty}\\sin x"),
        ],
    ),
    "matrices": (
        [
            ("\\begin{pmatrix}2\\\\4\\end{pmatrix}", "2\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
            ("\\begin{pmatrix}1&0\\\\0&1\\end{pmatrix}", "\\begin{bmatrix}1&1\\\\0&1\\end{bmatrix}^0"),
            ("-2", "\\begin{vmatrix}1&2\\\\3&4\\end{vmatrix}"), ("\\langle 1,2\\rangle", "(1,2)"),
            ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\left[\\begin{array}{c}1\\\\2\\end{array}\\right]"),
            ("\\begin{pmatrix}1&3\\\\2&4\\end{pmatrix}", "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}^T"),
            ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\langle 1, 2 \\rangle"),
        ],
        [
            ("\\begin{pmatrix}2\\\\4\\end{pmatrix}", "2\\begin{pmatrix}1\\\\3\\end{pmatrix}"),
            ("2", "\\begin{vmatrix}1&2\\\\3&4\\end{vmatrix}"), ("\\langle1,2\\rangle", "\\langle2,1\\rangle"),
            ("5", "\\begin{pmatrix}5\\\\5\\end{pmatrix}"),
            ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}^T"),
        ],
    ),
    "layout": (
        [
            ("5", "\\colorbox{yellow}{5}"), ("5", "{\\bf 5}"), ("5", "\\phantom{1}5"), ("\\sqrt[3]{2}", "∛2"),
            ("\\sqrt{5}", "√(5)"), ("x+1", "𝑥+1"), ("\\lfloor x\\rfloor", "⌊x⌋"),
            ("②③", "\\textcircled{2}\\textcircled{3}"), ("\\sqrt{2+3}", "√5"), ("x^{12}", "x¹²"),
            ("\\frac{3}{4}", "¾"), ("1.76\\times10^{-10}", "1.76\\text{e}{-10}"), ("1.5\\times10^{3}", "1.5E3"),
        ],
        [
            ("5", "\\phantom{5}1"), ("2", "\\sqrt[3]{2}"), ("x^{12}", "x^1 2"), ("②③", "②④"),
            ("1.76\\times10^{-10}", "1.76\\text{e}{10}"), ("\\frac34", "3\\frac14"),
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CLASSES)
def test_what_a_class_accepts_and_refuses(name: str) -> None:
    same, different = CLASSES[name]
    pairs = [*same, *different]
    verdicts = grade_batch([(f"So $\\boxed{{{answer}}}$.", gold) for gold, answer in pairs])
    wrong = [
        (gold, answer, verdict.reason)
        for place, ((gold, answer), verdict) in enumerate(zip(pairs, verdicts, strict=True))
        if verdict.correct != (place < len(same))
    ]
    assert wrong == []
    assert not any(verdict.failed for verdict in verdicts)


@pytest.mark.parametrize(
    "end",
    [
        "<|im_end|>",
        "<|endoftext|>",
        "<|eot_id|>",
        "</s>",
        "<｜end▁of▁sentence｜>",
        "<end_of_turn>",
        "<|end|>",
        "<|return|>",
    ],
)
def test_a_box_behind_the_end_of_the_turn_is_none(end: str) -> None:
    responses = [
        f"\\boxed{{5}}{end}\\boxed{{7}}",
        f"nothing{end}\\boxed{{7}}",
        f"\\boxed{{7}}{end}\n\\boxed{{5}}",
        f"<think>a{end}</think>\\boxed{{7}}",
    ]
    assert [verdict.correct for verdict in grade_batch([(text, "7") for text in responses])] == [
        False,
        False,
        True,
        False,
    ]
