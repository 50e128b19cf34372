"""Text and instruction data for the demo, made from the documentation in every Python installation.

    documented objects ──> pages of plain text (the base model's corpus)
                      └──> questions and answers (the adapter's data), a few kinds per object

Nothing is downloaded and nothing is random: the same Python gives the same rows, byte for byte. An object is either
in train or in dev, never in both, and the pages of dev objects are kept out of the base model's corpus.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re
import sys
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

# Safe to import (no window, no terminal, no printing) and in every CPython 3.10-3.13; missing modules are skipped.
# Earlier modules come first when two of them export the same object.
MODULES = """
builtins abc argparse array ast asyncio atexit base64 bdb binascii bisect bz2 calendar cmath cmd code codecs codeop
collections collections.abc colorsys compileall concurrent.futures configparser contextlib contextvars copy copyreg
cProfile csv ctypes dataclasses datetime dbm decimal difflib dis doctest email email.charset email.encoders email.errors
email.generator email.header email.headerregistry email.message email.mime.base email.mime.text email.parser
email.policy email.utils enum faulthandler fcntl filecmp fileinput fnmatch fractions ftplib functools gc getopt getpass
gettext glob graphlib grp gzip hashlib heapq hmac html html.parser http http.client http.cookiejar http.cookies
http.server imaplib importlib importlib.abc importlib.machinery importlib.metadata importlib.resources importlib.util
inspect io ipaddress itertools json json.decoder json.encoder keyword linecache locale logging logging.config
logging.handlers lzma mailbox marshal math mimetypes mmap modulefinder multiprocessing multiprocessing.connection
multiprocessing.managers multiprocessing.pool multiprocessing.shared_memory netrc numbers operator optparse os os.path
pathlib pdb pickle pickletools pkgutil platform plistlib poplib posix pprint profile pstats pty pwd py_compile pyclbr
pydoc queue quopri random re reprlib resource runpy sched secrets select selectors shelve shlex shutil signal smtplib
socket socketserver sqlite3 ssl stat statistics string stringprep struct subprocess symtable sys sysconfig syslog
tabnanny tarfile tempfile termios textwrap threading time timeit token tokenize trace traceback tracemalloc tty types
typing unicodedata unittest unittest.async_case unittest.mock urllib.error urllib.parse urllib.request urllib.response
urllib.robotparser uuid venv warnings wave weakref webbrowser wsgiref.handlers wsgiref.headers wsgiref.simple_server
wsgiref.util wsgiref.validate xml.dom xml.dom.minidom xml.dom.pulldom xml.etree.ElementTree xml.sax xml.sax.handler
xml.sax.saxutils xml.sax.xmlreader xmlrpc.client xmlrpc.server zipapp zipfile zipimport zlib zoneinfo
""".split()  # noqa: SIM905

NUM_DEV_ROWS = 200


@dataclass(frozen=True)
class Entry:
    """One documented object: `json.dumps`, `str.split`, the module `json`."""

    name: str
    kind: str  # module, class, function, method or attribute
    doc: str
    summary: str  # "" if the docstring does not open with a sentence
    signature: inspect.Signature | None = None
    methods: tuple[str, ...] = ()  # for a class: its public, documented methods


# ---------------------------------------------------------------------------------------------------------------------
# The documented objects


def documented_objects() -> list[Entry]:
    """Every public documented module, class, function, method and attribute of MODULES, each object once."""
    entries: list[Entry] = []
    seen: set[str] = set()

    def add(name: str, kind: str, obj: Any, methods: tuple[str, ...] = ()) -> bool:
        doc = getattr(obj, "__doc__", None)
        if not isinstance(doc, str) or doc.startswith("Alias for field number") or name in seen:
            return False
        doc = inspect.cleandoc(doc).strip()
        if len(doc) < 20 or re.search(r"\b0x[0-9a-f]{6,}", doc):  # an address differs from run to run
            return False
        seen.add(name)
        signature = clean_signature(obj) if kind in ("function", "method", "class") else None
        entries.append(Entry(name, kind, doc, summary_of(doc), signature, methods))
        return True

    known: set[int] = set()
    for module_name in MODULES:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module = importlib.import_module(module_name)
        except ImportError:
            continue
        prefix = "" if module_name == "builtins" else module_name + "."
        add(module_name, "module", module)
        for short, obj in sorted(public_members(module), key=lambda m: getattr(m[1], "__name__", "") != m[0]):
            # an object's own name comes before its aliases: array.array, not array.ArrayType
            if id(obj) in known or not (inspect.isclass(obj) or inspect.isroutine(obj)):
                continue
            known.add(id(obj))
            if inspect.isroutine(obj):
                add(prefix + short, "function", obj)
                continue
            methods = []
            for member_name, static in sorted(vars(obj).items()):
                if member_name.startswith("_"):
                    continue
                member = getattr(static, "__func__", static)  # the function a static or class method wraps
                if inspect.isroutine(member) and add(f"{prefix}{short}.{member_name}", "method", member):
                    methods.append(member_name)
                elif inspect.isdatadescriptor(member):
                    add(f"{prefix}{short}.{member_name}", "attribute", member)
            add(prefix + short, "class", obj, tuple(methods))
    return entries


def public_members(module: Any) -> list[tuple[str, Any]]:
    names = getattr(module, "__all__", None)
    if names is None:
        here = (module.__name__, "_" + module.__name__, None)
        names = [n for n in vars(module) if not n.startswith("_") and getattr(vars(module)[n], "__module__", 0) in here]
    return [(name, getattr(module, name)) for name in sorted(set(names)) if hasattr(module, name)]


def clean_signature(obj: Any) -> inspect.Signature | None:
    """The call signature without `self` and annotations; None if Python does not know it or cannot print it."""
    try:
        signature = inspect.signature(obj)
    except (ValueError, TypeError, AttributeError):  # the last of Python 3.13.0: the signature of epoll.register
        return None
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    if parameters and parameters[0].name in ("self", "cls", "type", "mcls"):
        parameters = parameters[1:]
    signature = inspect.Signature(parameters)
    text = str(signature)
    unprintable = any(part in text for part in ("<", "0x", "{", sys.prefix, sys.base_prefix))  # or true here only
    return None if unprintable or len(text) > 160 else signature


def summary_of(doc: str) -> str:
    """The first sentence of the first paragraph that is prose, on one line; "" if there is none to quote."""
    for paragraph in doc.split("\n\n"):
        lines = [line.strip() for line in paragraph.splitlines()]
        while lines and (
            " -> " in lines[0] or re.match(r"^[\w.]+\(.*\)?[:,]?( ->.*)?$", lines[0])
        ):  # S.split() -> list
            lines = lines[1:]
        text = " ".join(" ".join(lines).split())
        if not text:
            continue
        sentence = re.match(r"(.+?(?<!e\.g)(?<!i\.e)(?<!etc)(?<!cf)(?<!vs)[.!?])(?=\s+[A-Z`*'\"(]|$)", text)
        text = sentence.group(1) if sentence else text
        prose = re.match(r"[A-Z`'\"*(]", text) and len(text.split()) >= 4 and not text.endswith((":", ","))
        if (
            not prose
            or not 20 <= len(text) <= 300
            or ">>>" in text
            or "::" in text
            or text.count("(") != text.count(")")
        ):
            return ""
        return text if text[-1] in ".!?" else text + "."
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# Questions about them


def questions(entry: Entry, num_same_short_name: int) -> list[tuple[str, str]]:
    """(instruction, output) pairs about one object; `num_same_short_name` objects share the last part of its name."""
    name, kind, summary = entry.name, entry.kind, entry.summary
    owner, _, short = name.rpartition(".")
    pairs: list[tuple[str, str]] = []

    if summary:
        ask = {
            "module": f"What is the module {name} for?",
            "class": f"What is the class {name}?",
            "attribute": f"What does the attribute {name} hold?",
        }
        pairs.append((ask.get(kind, f"What does {name} do?"), summary))
        words = summary.split()
        if len(words) >= 9:
            cut = len(words) * 2 // 5
            start, rest = " ".join(words[:cut]), " ".join(words[cut:])
            pairs.append((f"Complete the description of {name}: {start}", rest))
        if kind == "function" and owner and short not in summary:
            pairs.append((f"Which function of the module {owner} fits this description? {summary}", name))
        if kind == "method" and short not in summary:
            pairs.append((f"Which method of {owner} fits this description? {summary}", name))

    if entry.signature is not None and kind != "class":
        parameters = list(entry.signature.parameters.values())
        stars: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
        listed = [stars.get(p.kind, "") + p.name + " (optional)" * (p.default is not p.empty) for p in parameters]
        if listed:
            pairs.append((f"Which arguments does {name} take?", ", ".join(listed) + "."))
        elif kind == "function":  # many methods take none: the answer would be learned blindly
            pairs.append((f"Which arguments does {name} take?", "It takes no arguments."))
        with_default = [p for p in parameters if p.default is not p.empty]
        if with_default:
            one = with_default[len(name) % len(with_default)]  # one per function, another for each
            pairs.append((f"What is the default of {one.name} in {name}?", f"{one.default!r}"))
        if len(parameters) >= 2:
            pairs.append((f"Write the signature of {name}.", f"{name}{entry.signature}"))

    if kind in ("function", "class") and owner and num_same_short_name == 1:
        pairs.append((f"In which module is the {kind} {short}?", f"The {kind} {short} is in the module {owner}."))
    if 2 <= len(entry.methods) <= 16:
        pairs.append((f"Which methods does the class {name} have?", ", ".join(entry.methods) + "."))
    return pairs


def make_demo_data() -> tuple[list[str], list[str], list[dict[str, str]], list[dict[str, str]]]:
    """Returns (corpus pages, held-out pages, train rows, dev rows).

    Objects with the same docstring (many methods of related classes) form one group, and each group goes to one
    side, so that no dev answer was seen in training under a different object's name.
    """
    entries = documented_objects()
    short_names = Counter(e.name.rpartition(".")[2] for e in entries)
    groups: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        groups[entry.summary or entry.doc].append(entry)

    corpus: list[str] = []
    held_out: list[str] = []
    train: list[dict[str, str]] = []
    dev: list[dict[str, str]] = []
    asked: set[str] = set()
    for key in sorted(groups, key=lambda text: hashlib.sha256(text.encode()).hexdigest()):  # shuffled, always the same
        members = groups[key]
        rows = []
        for entry in members[:3]:  # the fourth with the same docstring teaches nothing
            for instruction, output in questions(entry, short_names[entry.name.rpartition(".")[2]]):
                if instruction not in asked:
                    asked.add(instruction)
                    rows.append({"instruction": instruction, "input": "", "output": output})
        pages = [f"{e.name}{e.signature or ''}\n\n{e.doc}" for e in members[:3]]
        is_dev = len(dev) < NUM_DEV_ROWS and len(members) == 1 and members[0].kind != "module" and bool(rows)
        (held_out if is_dev else corpus).extend(pages)
        (dev if is_dev else train).extend(rows)

    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it separately; the docstrings are enough
        topics: dict[str, str] = {}  # type: ignore[no-redef]
    for topic in sorted(topics):  # cut at paragraphs into pages of about 2000 characters, like the others
        page = ""
        for paragraph in topics[topic].strip().split("\n\n"):
            if page and len(page) + len(paragraph) > 2000:
                corpus.append(page.strip())
                page = ""
            page += paragraph + "\n\n"
        corpus.append(page.strip())
    return corpus, held_out, train, dev
