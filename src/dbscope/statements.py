"""What a SQL text will do when the driver runs it: read, write, or steer the transaction.

The text alone decides; nothing is asked of the server, and the dialect is not known.
Where dialects read the same characters differently, every reading counts and the strongest kind wins.
Unknown statements are writes: who wants only readers refuses what it does not know.

What a text cannot tell:

* Functions that write (`SELECT setval(…)`) look like reads; a read-only transaction makes the server refuse them.
* `CALL`, `EXECUTE` and `DO $$…$$` are writes, whatever they run; PostgreSQL refuses a `COMMIT` in there by itself.
* DDL is a write, though MySQL and Oracle also commit the open transaction when they meet it.
* T-SQL may leave out the `;` between statements; then only the first one is seen.
"""

import re
from collections.abc import Iterable, Iterator
from enum import Enum


class Kind(Enum):
    """What a statement does, from weakest to strongest: of several statements in one text the strongest counts."""

    READ = 1
    """Changes nothing; `SELECT … FOR UPDATE` belongs here: it locks rows and alters none."""
    SETTING = 2
    """Changes the connection, not the data: SET, LISTEN, ATTACH, a LOCK TABLE that ends with the transaction."""
    SAVEPOINT = 3
    """Sets, releases or returns to a savepoint (outside a transaction SQLite takes the first one for BEGIN)."""
    WRITE = 4
    """Changes data, schema or files, sends a NOTIFY (lost without a commit), or is not known."""
    CONTROL = 5
    """Begins, ends or prepares to end a transaction; also `SET autocommit` and MySQL's LOCK TABLES, which commit."""


# What is known of short texts: a dictionary, which the listener of every statement asks without a call of `kind`.
known_kinds: dict[str, Kind] = {}
_MOST_TEXTS, _LONGEST = 1024, 4096  # characters; some 4 MB in all


def kind(sql: str) -> Kind:
    """Tell what the server will do with `sql`; never raises, and a text without any statement is a READ.

    Short texts are remembered until there are too many, long ones are read again, in time linear in their length.
    """
    found = known_kinds.get(sql)
    if found is None:
        found = _classify(sql)
        if len(sql) <= _LONGEST:
            if len(known_kinds) >= _MOST_TEXTS:
                known_kinds.clear()
            known_kinds[sql] = found
    return found


def _classify(sql: str) -> Kind:
    # Most texts are one plain statement, which a few substring tests settle without a scan.
    first = _FIRST_WORD.match(sql)
    if first and ";" not in sql:
        word = first[1].upper()
        if word in ("INSERT", "UPDATE", "DELETE"):
            return Kind.WRITE
        if word == "SELECT":
            upper = sql.upper()
            if not any(verb in upper for verb in ("INTO", "INSERT", "UPDATE", "DELETE", "MERGE")):
                return Kind.READ
    if any(mark in sql for mark in ("\\", "#", "[", "--", "/*")):
        found = [
            _read(sql, _POSTGRESQL),
            _read(_MYSQL_RUNS.sub(r" \1 ", sql), _MYSQL),
            _read(sql, _OTHERS),
        ]
    else:
        found = [_read(sql, _POSTGRESQL)]
    # A reading that ends inside a literal, or is no SQL, is not the one the server will make of a working text.
    return _strongest([kind for sound, kind in found if sound] or [kind for _, kind in found])


def _strongest(kinds: Iterable[Kind]) -> Kind:
    return max(kinds, key=lambda kind: kind.value)


# --- literals and comments -------------------------------------------------------------------------------------------

# Each alternative runs to the end of the text if its closing mark is missing, so that none has to backtrack, and
# starts with a plain character, by which `re` finds the next candidate fast; hence lookbehinds after that character.
_TEXT = r"'[^']*(?:'|\Z)"  # a doubled quote is two literals side by side, which changes nothing here
_NAMES = r'"[^"]*(?:"|\Z)', r"`[^`]*(?:`|\Z)"
_BRACKETS = r"\[(?:[^][\"'$/-]|[/-](?![*-])|\$(?!\w*\$))*\]"  # a name, or a subscript, which holds no keyword of ours
_COMMENT = r"/\*.*?(?:\*/|\Z)"
_NESTING = r"/\*(?:[^*/]+|\*(?!/)|/(?!\*)|{})*(?:\*/|\Z)"
_ESCAPED = r"{0}[^{0}\\]*(?:(?:\\.|{0}{0})[^{0}\\]*)*(?:{0}|\Z)"


def _noise(*alternatives: str) -> re.Pattern[str]:
    return re.compile("|".join(alternatives), re.DOTALL)


_POSTGRESQL = _noise(
    *(prefix + _ESCAPED.format("'") for prefix in "Ee"),
    r"\$(?<![\w$]\$)([^\W\d]\w*|)\$(?:.*?\$\1\$|.*)",
    r"--[^\r\n]*",
    _NESTING.format(_NESTING.format(_NESTING.format(_COMMENT))),
    _BRACKETS,
    _TEXT,
    *_NAMES,
)
_MYSQL = _noise(
    _ESCAPED.format("'"),
    _ESCAPED.format('"'),
    _NAMES[1],
    _BRACKETS,
    r"--(?=[\0- ])[^\n]*",
    r"#[^\n]*",
    _COMMENT,
)
_MYSQL_RUNS = re.compile(r"/\*M?!\d*(.*?)(?:\*/|\Z)", re.DOTALL)  # a comment for all but MySQL and MariaDB
_OTHERS = _noise(_TEXT, *_NAMES, r"\[[^]]*(?:\]|\Z)", r"--[^\n]*", _COMMENT)  # SQLite, SQL Server, Oracle

# What a wrong reading leaves over: the end of a nested comment, an escaped quote, a dollar quote.
_STRAY = re.compile(r"\*/|\\|\$(?<![\w$]\$)(?:[^\W\d]\w*)?\$")


def _read(sql: str, noise: re.Pattern[str]) -> tuple[bool, Kind]:
    """Tell whether `sql` makes sense to a server that skips `noise`, and its kind there."""
    bare = noise.sub(" ", sql + "\n\0")  # a literal that is never closed swallows the end mark
    sound = bare.endswith("\0") and not _STRAY.search(bare)
    kinds = [Kind.READ]
    for statement in _statements(bare.removesuffix("\0").upper()):
        if statement.strip(" \t\r\n\ufeff"):
            kinds.append(_kind_of(statement))
            sound = sound and _FIRST_WORD.match(statement) is not None  # no server starts with, say, `#`
    return sound, _strongest(kinds)


# --- statements ------------------------------------------------------------------------------------------------------

_FIRST_WORD = re.compile(r"[\s({\ufeff]*(\w+)")

# What follows a BEGIN that opens a transaction; any other one opens a block of statements.
_OF_TRANSACTION = (
    r"\s*(?:\Z|(?:TRAN|TRANSACTION|WORK|DEFERRED|IMMEDIATE|EXCLUSIVE|CONCURRENT|DISTRIBUTED|ISOLATION|READ"
    r"|(?:NOT\s+)?DEFERRABLE)\b)"
)
_HAS_BODY = re.compile(
    r"\s*(?:(?:CREATE|ALTER)\b.*?\b(?:TRIGGER|FUNCTION|PROC|PROCEDURE|EVENT)\b|WITH\s+FUNCTION\b|BEGIN\b)",
    re.DOTALL,
)
_OPENS = re.compile(rf"BEGIN\b(?<![\w.@$]BEGIN)(?<!\W:BEGIN)(?!{_OF_TRANSACTION})")
# An END that closes a block follows a `;`, unlike that of a CASE expression or a column of that name.
_CLOSES = re.compile(r"\s*END\b(?!\s+(?:IF|CASE|LOOP|WHILE|FOR)\b)")


def _statements(text: str) -> Iterator[str]:
    """Cut at each `;`, but leave the body of a trigger, routine or anonymous block in one piece."""
    body: list[str] = []
    depth = 0
    for piece in text.split(";"):
        body.append(piece)
        if depth or _HAS_BODY.match(piece):
            depth += len(_OPENS.findall(piece)) - bool(_CLOSES.match(piece))
        if depth <= 0:
            yield ";".join(body)
            body, depth = [], 0
    yield from body  # what is never closed was no body, but a column called "begin"


def _kind_of(statement: str) -> Kind:
    """The kind of one statement, in capitals and without literals."""
    if carrier := _CARRIES.match(statement):
        statement = statement[carrier.end() :]
    first = _FIRST_WORD.match(statement)
    if not first:
        return Kind.WRITE
    if rules := _CLOSER_LOOK.get(first[1]):
        spaced = " ".join(statement[first.start(1) :].split())
        for pattern, kind in rules:
            if pattern.search(spaced):
                return kind
    return _BY_FIRST_WORD.get(first[1], Kind.WRITE)


# EXPLAIN ANALYZE and MariaDB's SET STATEMENT … FOR run the statement that follows.
_CARRIES = re.compile(
    r"(?:\s*(?:EXPLAIN|DESCRIBE|DESC)\s*(?:\((?=[^()]*\bANALY[SZ]E\b)[^()]*\)"
    r"|ANALY[SZ]E\b(?:\s+VERBOSE\b|\s+FORMAT\s*=\s*\w+)*)"
    r"|\s*SET\s+STATEMENT\b.*?\bFOR\b)+",
    re.DOTALL,
)

_BY_FIRST_WORD = {
    word: kind
    for kind, words in {
        Kind.READ: "SELECT WITH VALUES TABLE SHOW EXPLAIN DESCRIBE DESC PRAGMA FETCH MOVE CLOSE HANDLER HELP",
        Kind.SETTING: "SET RESET USE LOCK DISCARD DEALLOCATE LISTEN UNLISTEN ATTACH DETACH",
        Kind.SAVEPOINT: "SAVEPOINT RELEASE SAVE",  # T-SQL says SAVE TRANSACTION name
        Kind.CONTROL: "COMMIT END ROLLBACK ABORT XA UNLOCK",
    }.items()
    for word in words.split()
}

# INTO stores what was selected, unless it goes to a variable; the other verbs follow a parenthesis where they head a
# statement, unlike in FOR UPDATE. `:into` and `%(update)s` are parameters.
_VERB = r" ?(?:INSERT|UPDATE|DELETE|MERGE)\b"
_STORES = rf"INTO\b(?<![\w:@$]INTO)(?<!%\(INTO)(?! ?@)|\((?<!%\(){_VERB}|\){_VERB}"

# For some first words, the first pattern found in the statement decides.
_CLOSER_LOOK = {
    word: [(re.compile(pattern), kind) for pattern, kind in rules]
    for words, rules in {
        "SELECT WITH VALUES TABLE": ((_STORES, Kind.WRITE), (r"\bINTO ?@", Kind.SETTING)),
        "COPY": ((_STORES, Kind.WRITE), (r"\bTO STDOUT\b", Kind.READ)),
        "DECLARE": ((_STORES, Kind.WRITE), (r"\bCURSOR\b", Kind.READ)),
        "EXPLAIN": ((r"^EXPLAIN PLAN\b", Kind.WRITE),),  # Oracle keeps plans in a table
        "BEGIN": ((rf"^BEGIN{_OF_TRANSACTION}|\b(?:COMMIT|ROLLBACK)\b", Kind.CONTROL),),
        "START PREPARE": ((r"^\w+ TRANSACTION\b", Kind.CONTROL),),
        # T-SQL goes back to a savepoint with ROLLBACK TRANSACTION name, but SQLite ignores the name and ends the
        # transaction; the names SQLAlchemy gives tell them apart.
        "ROLLBACK": (
            (r"^ROLLBACK(?: WORK| TRANSACTION)? TO\b", Kind.SAVEPOINT),
            (r"^ROLLBACK TRAN(?:SACTION)? SA_SAVEPOINT_", Kind.SAVEPOINT),
        ),
        "LOCK": ((r"\b(?:READ|WRITE)\b", Kind.CONTROL),),  # MySQL commits first; PostgreSQL has other words
        "ALTER": ((r"^ALTER SESSION\b", Kind.SETTING),),
        "SET": (
            (r"\bAUTOCOMMIT ?:?=|\bIMPLICIT_TRANSACTIONS O", Kind.CONTROL),
            # T-SQL statements that follow without a `;`
            (r"^SET PASSWORD\b| (?:INSERT|UPDATE|DELETE|MERGE|EXEC|EXECUTE) ", Kind.WRITE),
        ),
        "PRAGMA": (
            (r"\b(?:USER_VERSION|APPLICATION_ID|SCHEMA_VERSION) ?[=(]", Kind.WRITE),
            (r"\b(?:INCREMENTAL_VACUUM|OPTIMIZE|WAL_CHECKPOINT)\b", Kind.WRITE),
            (r"\b(?:(?:TABLE|INDEX)_(?:X?INFO|LIST)|FOREIGN_KEY_LIST)\b", Kind.READ),
            (r"\b(?:FOREIGN_KEY|QUICK|INTEGRITY)_CHECK\b", Kind.READ),
            (r"[=(]", Kind.SETTING),
        ),
    }.items()
    for word in words.split()
}
