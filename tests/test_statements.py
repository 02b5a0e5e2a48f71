"""What `kind()` promises, statement by statement, under noise, and against a real SQLite."""

import random
import sqlite3
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbscope import statements
from dbscope.statements import Kind, kind

# Each group is one dialect's way of speaking; a text may hold newlines.
TABLE: dict[Kind, dict[str, list[str]]] = {
    Kind.READ: {
        "any": [
            "SELECT 1",
            "select a from t where b = :into and c = :update",
            "SELECT a FROM t WHERE a = %(into)s OR b = coalesce(%(update)s, updated_at)",
            "SELECT a FROM t FOR UPDATE",
            "SELECT a FROM t WHERE (a) FOR UPDATE",
            "SELECT replace(lower(replace(a, 'x', 'y')), 'a', 'b') FROM t",
            "(SELECT 1) UNION (SELECT 2)",
            "((SELECT 1))",
            "SELECT 1;",
            ";;SELECT 1;;",
            "VALUES (1), (2)",
            "WITH x AS (SELECT 1) SELECT * FROM x",
            "WITH RECURSIVE x(n) AS (VALUES (1) UNION ALL SELECT n + 1 FROM x WHERE n < 3) SELECT n FROM x",
            "SELECT CASE WHEN a THEN 1 END FROM t; SELECT 1",
            "SELECT begins, ended, t.committed FROM t; SELECT 1",
            "SELECT sum(intolerance) FROM t; SELECT 1",
        ],
        "empty": ["", " \n\t", ";", "-- nothing", "/* nothing */", "/* not even closed", "# nothing", "\ufeff"],
        "postgresql": [
            "TABLE t",
            "SHOW search_path",
            "EXPLAIN SELECT 1",
            "EXPLAIN DELETE FROM t",
            "EXPLAIN (COSTS OFF) INSERT INTO t VALUES (1)",
            "EXPLAIN SELECT analyze FROM t",
            "EXPLAIN ANALYZE SELECT 1",
            "EXPLAIN ANALYZE VERBOSE SELECT 1",
            "EXPLAIN (ANALYZE, BUFFERS) (SELECT 1)",
            "DECLARE c CURSOR FOR SELECT 1",
            "FETCH NEXT FROM c",
            "MOVE 5 IN c",
            "CLOSE c",
            "COPY t TO STDOUT",
            "COPY (SELECT a FROM t) TO STDOUT WITH (FORMAT csv)",
            "SELECT 1 /* one /* two /* three */ ; COMMIT */ ; INSERT */",
            "SELECT $$it's; COMMIT$$, $a$ $$; COMMIT $b$; ROLLBACK $a$",
            "SELECT E'it\\'s; COMMIT', e'a''b\\'; COMMIT'",
            "SELECT 'C:\\'; SELECT ';COMMIT;'",
            "SELECT ARRAY['a]', '; COMMIT', 'b']",
            "SELECT a[1:2], '{}'::int[], b['x'] FROM t; SELECT 1",
            "SELECT data #>> '{a}', 'x' FROM t; SELECT 1",
            "SELECT a[1 /* ]; COMMIT */] FROM t",
            "SELECT a[length($$]; COMMIT $$)] FROM t",
            "SELECT E'it\\'s', $$; COMMIT$$",
            "SELECT E'a''\\'; COMMIT', $$x$$",
            "SELECT DATE'2020-01-01', 'C:\\'; SELECT 1",
        ],
        "mysql": [
            "SELECT 'it\\'s; COMMIT'",
            'SELECT "it\\"s; COMMIT"',
            "SELECT 1 # don't",
            "SELECT 1 # a ` ; COMMIT",
            "SELECT `it's`, 'it\\'s; COMMIT' FROM t",
            "SELECT 1 -- it's; COMMIT\n, 'it\\'s'",
            "SELECT 'it\\'s', 'Bob\\'s; COMMIT'",
            "SELECT a$b$, 'it\\'s; COMMIT' FROM t",
            "# a comment\nSELECT 1",
            "SELECT 1; # a comment",
            "DESCRIBE t",
            "DESC t",
            "EXPLAIN FORMAT=JSON UPDATE t SET a = 1",
            "EXPLAIN ANALYZE FORMAT=TREE SELECT 1",
            "SHOW TABLES",
            "HANDLER t READ FIRST",
            "HELP 'select'",
            "SELECT `it's; COMMIT` FROM t",
            "SET STATEMENT max_statement_time=1 FOR SELECT 1",
            "SELECT /*+ MAX_EXECUTION_TIME(5) */ 1; SELECT 1",
        ],
        "sqlite": [
            "PRAGMA foreign_keys",
            "PRAGMA main.table_info('t')",
            'PRAGMA "main".table_xinfo("t")',
            "PRAGMA index_list = t",
            "PRAGMA foreign_key_list(t)",
            "PRAGMA foreign_key_check(t)",
            "PRAGMA quick_check(1)",
            "PRAGMA integrity_check(1)",
            "EXPLAIN QUERY PLAN DELETE FROM t",
            "EXPLAIN COMMIT",
            "SELECT [it's; COMMIT] FROM t",
            "SELECT [insert into], [a-b; commit] FROM t",
            "\ufeffSELECT 1",
        ],
        "oracle": ["WITH FUNCTION f RETURN NUMBER IS BEGIN RETURN 1; END; SELECT f FROM dual"],
    },
    Kind.SETTING: {
        "postgresql": [
            "SET search_path TO a",
            "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE",
            "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
            "SET LOCAL statement_timeout = 5",
            "RESET ALL",
            "DISCARD TEMP",
            "DEALLOCATE ALL",
            "LOCK TABLE t IN ACCESS EXCLUSIVE MODE",
            "LISTEN c",
            "UNLISTEN *",
        ],
        "mysql": [
            "USE db",
            "SET @a = 1, @old = @@autocommit",
            "SET NAMES utf8mb4",
            "SELECT a INTO @a FROM t",
            "SELECT a FROM t INTO\n@a",
        ],
        "sqlite": [
            "PRAGMA foreign_keys = ON",
            "PRAGMA foreign_keys(1)",
            "PRAGMA cell_size_check = 1",
            "ATTACH 'a.db' AS a",
            "DETACH a",
        ],
        "oracle": ["ALTER SESSION SET NLS_DATE_FORMAT = 'YYYY'"],
        "mssql": ["SET NOCOUNT ON", "SET IDENTITY_INSERT t ON"],
    },
    Kind.SAVEPOINT: {
        "any": [
            "SAVEPOINT a",
            "RELEASE a",
            "RELEASE SAVEPOINT a",
            "ROLLBACK TO a",
            "ROLLBACK TO SAVEPOINT a",
            'ROLLBACK WORK TO "a"',
            "ROLLBACK TRANSACTION TO SAVEPOINT a",
        ],
        "mssql": ["SAVE TRANSACTION sa_savepoint_1", "ROLLBACK TRANSACTION sa_savepoint_1"],
    },
    Kind.WRITE: {
        "any": [
            "INSERT INTO t VALUES (1)",
            "insert into t values (';', 'COMMIT')",
            "UPDATE t SET a = 1",
            "DELETE FROM t",
            "MERGE INTO t USING s ON (a = b) WHEN MATCHED THEN DELETE",
            "CREATE TABLE t (a int)",
            "CREATE TEMP TABLE t (a int)",
            "ALTER TABLE t ADD b int",
            "DROP TABLE t",
            "TRUNCATE t",
            "GRANT SELECT ON t TO u",
            "CALL p()",
            "{call p()}",
            "EXECUTE p",
            "GIBBERISH",
            "?",
            "\x00 SELECT 1;",
            "WITH x AS (SELECT 1) INSERT INTO t SELECT * FROM x",
            "WITH x AS (SELECT 1) UPDATE t SET a = 1",
            "WITH x AS (SELECT 1) DELETE FROM t",
            "SELECT 1; INSERT INTO t VALUES (1); SAVEPOINT a",
            "(DELETE FROM t)",
            "SELECT (INSERT INTO t VALUES (1))",
        ],
        "postgresql": [
            "SELECT * INTO u FROM t",
            "SELECT a, ';' INTO/**/u FROM t",
            "WITH x AS (INSERT INTO t VALUES (1) RETURNING *) SELECT * FROM x",
            "WITH x AS MATERIALIZED (/**/UPDATE t SET a = 1 RETURNING *) SELECT * FROM x",
            "WITH x AS (DELETE FROM t RETURNING *) TABLE x",
            "WITH x AS (MERGE INTO t USING s ON (a = b) WHEN MATCHED THEN DELETE RETURNING *) SELECT * FROM x",
            "EXPLAIN ANALYZE INSERT INTO t VALUES (1)",
            "EXPLAIN ANALYSE VERBOSE UPDATE t SET a = 1",
            "EXPLAIN (VERBOSE, ANALYZE) DELETE FROM t",
            "EXPLAIN(ANALYZE)CREATE TABLE u AS SELECT 1",
            "EXPLAIN ANALYZE EXECUTE p",
            "EXPLAIN ANALYZE",
            "DECLARE c CURSOR FOR WITH x AS (DELETE FROM t RETURNING *) SELECT * FROM x",
            "COPY t FROM STDIN",
            "COPY t (a, b) FROM '/tmp/t'",
            "COPY t TO '/tmp/t'",
            "COPY (DELETE FROM t RETURNING *) TO STDOUT",
            "DO $$ BEGIN DELETE FROM t; COMMIT; END $$",
            "DO $body$ BEGIN /* now */ DELETE FROM t; COMMIT; END $body$",
            "DO $body$ BEGIN DELETE FROM t; COMMIT; END; $body$ LANGUAGE plpgsql",
            "CREATE FUNCTION f() RETURNS int AS $$ SELECT 1; COMMIT; $$ LANGUAGE sql",
            "CREATE FUNCTION f() RETURNS int LANGUAGE sql BEGIN ATOMIC INSERT INTO t VALUES (1); SELECT 1; END",
            "CREATE FUNCTION f(a int) RETURNS int RETURN CASE WHEN a > 0 THEN 1 END",
            'CREATE TABLE t (begin date, "end" date)',
            "PREPARE p AS INSERT INTO t VALUES (1)",
            "NOTIFY c",
            "VACUUM",
            "ANALYZE",
            "REINDEX TABLE t",
            "REFRESH MATERIALIZED VIEW v",
            "COMMENT ON TABLE t IS 'COMMIT'",
        ],
        "mysql": [
            "REPLACE INTO t VALUES (1)",
            "SELECT a FROM t INTO OUTFILE '/tmp/t'",
            "TABLE t INTO OUTFILE '/tmp/t'",
            "SELECT 1 /*!50000 INTO OUTFILE */ '/tmp/t'",
            "/*!40101 INSERT INTO t VALUES (1) */",
            "/*M!100100 DELETE FROM t */;",
            "LOAD DATA INFILE 'a' INTO TABLE t",
            "DO release_lock('a')",
            "START REPLICA",
            "PREPARE p FROM 'SELECT 1'",
            "SET PASSWORD = 'a'",
            "SET STATEMENT max_statement_time=1 FOR DELETE FROM t",
            "SELECT 1--1 INTO OUTFILE 'a'",
            "DESC ANALYZE UPDATE t SET a = 1",
            "DESCRIBE ANALYZE DELETE FROM t",
            "SET STATEMENT forced=1,\nxfor=2 FOR DELETE FROM t",
            "CREATE PROCEDURE p() BEGIN IF a THEN COMMIT; END IF; CASE b WHEN 1 THEN ROLLBACK; END CASE; COMMIT; END",
            "CREATE DEFINER=a@b PROCEDURE p() l:BEGIN DECLARE EXIT HANDLER FOR SQLEXCEPTION BEGIN ROLLBACK; END; "
            "START TRANSACTION; COMMIT; END",
            "CREATE PROCEDURE p() BEGIN WHILE a DO COMMIT; END WHILE; REPEAT COMMIT; UNTIL a END REPEAT; COMMIT; END",
            "CREATE PROCEDURE p() BEGIN l: LOOP LEAVE l; END LOOP; FOR r IN c DO COMMIT; END FOR; COMMIT; END",
            "CREATE EVENT e ON SCHEDULE EVERY 1 DAY DO BEGIN DELETE FROM t; COMMIT; END",
            "BEGIN NOT ATOMIC INSERT INTO t VALUES (1); END",
        ],
        "sqlite": [
            "CREATE TRIGGER x AFTER INSERT ON t BEGIN DELETE FROM t; SELECT new.begin, new.end; SELECT 1; END",
            "CREATE TRIGGER x AFTER INSERT ON t BEGIN SELECT CASE a WHEN 1 THEN RAISE(ROLLBACK, 'x') END; END;",
            "CREATE TEMP\nTRIGGER x AFTER INSERT ON t BEGIN DELETE FROM t; END",
            "PRAGMA user_version = 5",
            "PRAGMA application_id(5)",
            "PRAGMA incremental_vacuum",
            "PRAGMA optimize",
            "PRAGMA wal_checkpoint(TRUNCATE)",
            "WITH x AS (SELECT 1) REPLACE INTO t SELECT * FROM x",
            "INSERT OR ROLLBACK INTO t VALUES (1)",
        ],
        "oracle": [
            "BEGIN p(:a); END;",
            "BEGIN p(:begin); END;",
            "BEGIN read_all; END;",
            "DECLARE x NUMBER; BEGIN p(x); END;",
            "EXPLAIN PLAN FOR SELECT 1 FROM dual",
            "CREATE OR REPLACE PROCEDURE p IS BEGIN DELETE FROM t; COMMIT; END;",
            "ALTER FUNCTION f COMPILE",
        ],
        "mssql": [
            "SELECT * INTO #u FROM t",
            "SELECT 1; ;WITH x AS (SELECT 1) INSERT t SELECT * FROM x",
            "WITH x AS (SELECT 1 AS a) INSERT INTO @t SELECT a FROM x",
            "SET NOCOUNT ON INSERT INTO t VALUES (1)",
            "SET NOCOUNT ON UPDATE t SET a = 1",
            "SET NOCOUNT ON DELETE FROM t",
            "SET NOCOUNT ON MERGE t USING s ON a = b WHEN MATCHED THEN DELETE;",
            "SET NOCOUNT ON EXECUTE p",
            "SELECT a FROM (UPDATE t SET a = 1 OUTPUT a) AS x",
            "SELECT a FROM (MERGE t USING s ON a = b WHEN MATCHED THEN SET a = 1 OUTPUT a) AS x",
            "SET NOCOUNT ON EXEC p",
            "DECLARE @x int UPDATE t SET a = 1",
            "CREATE PROC p AS BEGIN BEGIN TRAN; DELETE FROM t; COMMIT; END",
            "ALTER PROC p AS BEGIN BEGIN TRY DELETE FROM t; END TRY BEGIN CATCH ROLLBACK; END CATCH; COMMIT; END",
        ],
    },
    Kind.CONTROL: {
        "any": [
            "BEGIN",
            "BEGIN;",
            "begin work",
            "START TRANSACTION READ ONLY",
            "COMMIT",
            "COMMIT AND CHAIN",
            "ROLLBACK",
            "ROLLBACK WORK",
            "END",
            "-- it's time\nCOMMIT",
            "/* it's time */ COMMIT",
            "SELECT 1; COMMIT",
            "SELECT ';'; COMMIT; INSERT INTO t VALUES (1)",
            "INSERT INTO t VALUES (1); COMMIT",
            "SELECT 1 --\n; COMMIT",
            "COMMIT; SELECT 'never closed",
        ],
        "postgresql": [
            "BEGIN ISOLATION LEVEL SERIALIZABLE",
            "BEGIN READ ONLY",
            "BEGIN NOT DEFERRABLE",
            "BEGIN DEFERRABLE",
            "END TRANSACTION",
            "ABORT",
            "PREPARE TRANSACTION 'a'",
            "COMMIT PREPARED 'a'",
            "ROLLBACK PREPARED 'a'",
            "SELECT 'a\\'; COMMIT",
            "SELECT 'a\\'; COMMIT; --'",
            "SELECT data #>> '{a}' FROM t; COMMIT",
            "SELECT a # b FROM t; COMMIT",
            "SELECT $$a$$; COMMIT",
            "SELECT a$b$; COMMIT; SELECT $b$",
            "SELECT somE'a\\'; COMMIT",
            "SELECT ARRAY[1, 2]; COMMIT; SELECT ']'",
            "-- a\rCOMMIT",
            "CREATE TABLE t (begin date); COMMIT",
            "CREATE TRIGGER x AFTER INSERT ON t EXECUTE FUNCTION f(); COMMIT",
            "CREATE FUNCTION f(begin date) RETURNS int AS $$ SELECT 1 $$ LANGUAGE sql; COMMIT",
            "CREATE FUNCTION f() RETURNS int LANGUAGE sql BEGIN ATOMIC SELECT 1; END; COMMIT",
            "DO $$ BEGIN NULL; END $$; COMMIT",
        ],
        "mysql": [
            "SET autocommit=0",
            "SET @@session.autocommit = 1",
            "SET @a = 1, autocommit := 1",
            "XA START 'a'",
            "LOCK TABLES t READ",
            "LOCK TABLE t WRITE",
            "UNLOCK TABLES",
            "/*! COMMIT */",
            "/*!50000\nCOMMIT\n*/",
            "/*!50000 COMMIT */; SELECT 1",
            "SELECT 1 # it's\n; COMMIT",
            "SELECT 1--1; COMMIT",
            'SELECT "\\"; COMMIT',
            "SELECT 1 /* /* */; COMMIT",
            "BEGIN NOT ATOMIC INSERT INTO t VALUES (1); COMMIT; END",
        ],
        "sqlite": [
            "BEGIN IMMEDIATE",
            "BEGIN DEFERRED",
            "BEGIN EXCLUSIVE",
            "BEGIN CONCURRENT",
            "BEGIN TRANSACTION",
            "ROLLBACK TRANSACTION a",
            "\ufeffCOMMIT",
            "SELECT [it's]; COMMIT",
            "SELECT `it's`; COMMIT",
            "CREATE TRIGGER x AFTER INSERT ON t BEGIN DELETE FROM t; END; COMMIT",
        ],
        "oracle": ["BEGIN DELETE FROM t; COMMIT; END;", "BEGIN DELETE FROM t; ROLLBACK; END;"],
        "mssql": [
            "BEGIN TRAN",
            "BEGIN DISTRIBUTED TRAN",
            "COMMIT TRAN",
            "ROLLBACK TRAN",
            "SET IMPLICIT_TRANSACTIONS ON",
            "SELECT * FROM #t; COMMIT",
        ],
    },
}
CASES = [
    pytest.param(sql, expected, id=f"{dialect}-{expected.name}-{sql[:40]!r}")
    for expected, dialects in TABLE.items()
    for dialect, texts in dialects.items()
    for sql in texts
]
EVERY = [(sql, expected) for expected, dialects in TABLE.items() for texts in dialects.values() for sql in texts]
# Texts that every dialect cuts the same way, so that they can be glued together and blown up.
UNDISPUTED = [(sql, it) for sql, it in EVERY if not set(sql) & set("\\#$[\0\ufeff") and "--" not in sql]
UNDISPUTED = [(sql, it) for sql, it in UNDISPUTED if "/*" not in sql and sql.count("'") % 2 == 0]
UNQUOTED = [(sql, it) for sql, it in UNDISPUTED if not set(sql) & set("'\"`")]

KEYWORDS = ["COMMIT", "; COMMIT;", "into", "(INSERT", ") delete", "BEGIN", "; end;", "$", ":x", "?", "é", "\n", " "]
HIDDEN = st.lists(st.sampled_from(KEYWORDS), max_size=6).map("".join)
GAPS = st.lists(
    st.one_of(
        st.sampled_from([" ", "\n", "\t", "\r\n", "-- it's; COMMIT\n", "/* don't; COMMIT */", "/* /* */; INSERT */ "]),
        HIDDEN.map(lambda text: f"/*{text}*/"),
    ),
    min_size=1,
    max_size=3,
).map("".join)


@pytest.mark.parametrize(("sql", "expected"), CASES)
def test_each_statement_has_its_kind(sql: str, expected: Kind) -> None:
    """Each statement of each dialect is taken for what its server makes of it."""
    assert kind(sql) is expected


def test_control_is_strongest_and_read_weakest() -> None:
    """The order of strength is the documented one."""
    assert sorted(Kind, key=lambda it: it.value) == [
        Kind.READ,
        Kind.SETTING,
        Kind.SAVEPOINT,
        Kind.WRITE,
        Kind.CONTROL,
    ]


@given(st.sampled_from(UNQUOTED), st.data())
def test_comments_whitespace_and_case_change_nothing(case: tuple[str, Kind], data: st.DataObject) -> None:
    """Whatever stands between the words, and however they are cased, the kind stays."""
    sql, expected = case
    words = sql.split(" ")
    gaps = data.draw(st.lists(GAPS, min_size=len(words) + 1, max_size=len(words) + 1))
    cased = [data.draw(st.sampled_from([word, word.upper(), word.lower(), word.title()])) for word in words]
    blown_up = "".join(gap + word for gap, word in zip(gaps, [*cased, ""], strict=True))
    assert kind(blown_up) is expected


@given(
    HIDDEN,
    st.sampled_from(
        [
            "'{}'",
            "'it''s{}'",
            '"{}"',
            '"a""{}"',
            "`{}`",
            "[{}]",
            "$${}$$",
            "$a1${}$a1$",
            "E'it\\'s{}'",
            "'it\\'s{}'",
            '"\\"{}"',
            "/*{}*/ 1",
            "/*a/*b*/{}*/ 1",
        ]
    ),
    st.sampled_from([(Kind.READ, "SELECT {} FROM t WHERE a = 1;"), (Kind.WRITE, "UPDATE t SET a = {}, b = 1; ")]),
)
def test_hidden_keywords_change_nothing(hidden: str, quoted: str, statement: tuple[Kind, str]) -> None:
    """Inside a literal, a quoted name or a comment, keywords and semicolons are just characters."""
    if quoted[0] in "$[":  # in brackets, `$$` may well open a literal of PostgreSQL's
        hidden = hidden.replace("$", "")
    expected, template = statement
    assert kind(template.format(quoted.format(hidden))) is expected


@given(st.lists(st.sampled_from(UNDISPUTED), min_size=1, max_size=5), st.sampled_from([";", " ; ", ";\n", "/**/;;"]))
def test_the_strongest_of_several_statements_counts(cases: list[tuple[str, Kind]], glue: str) -> None:
    """A COMMIT after a SELECT is a COMMIT."""
    strongest = max((expected for _, expected in cases), key=lambda it: it.value)
    assert kind(glue.join(sql for sql, _ in cases)) is strongest


@given(st.sampled_from(UNDISPUTED), st.sampled_from(["# into", "# it's", "-- it's", "--it's", "# ; COMMIT"]))
def test_disputed_comments_never_weaken(case: tuple[str, Kind], comment: str) -> None:
    """Where dialects disagree on what a comment is, the kind may come out stronger, never weaker."""
    sql, expected = case
    assert kind(f"{comment}\n{sql}\n{comment}").value >= expected.value


PIECES = [*"'\"`[]$/*-#\\@(){}%:.\n\0eEq", "SELECT", "FOR UPDATE", "/*!", "$a$", "END", "CASE", *KEYWORDS]


@given(st.sampled_from(["SELECT 1", "insert", "(Update", ""]), st.lists(st.sampled_from(PIECES)).map(" ".join))
def test_the_quick_look_agrees_with_the_scan(start: str, rest: str) -> None:
    """Any garbage has a kind, and a lone statement has the same one without the semicolon that calls for a scan."""
    assert kind(f"{start} {rest}") is kind(f"{start} {rest}\n;")


# --- against SQLite --------------------------------------------------------------------------------------------------

EXECUTED = [
    *(sql for sql, _ in UNDISPUTED if "VACUUM" not in sql),
    *TABLE[Kind.READ]["sqlite"],
    *("SELECT [a] FROM t", "SELECT `a` FROM t -- it's", "SELECT a FROM t /* not closed", "PRAGMA table_list"),
    *("CREATE TABLE u AS SELECT 1", "CREATE VIEW v AS SELECT 1", "REINDEX", "ANALYZE", "PRAGMA index_info('i')"),
    *("INSERT INTO t VALUES (2, 2) RETURNING a", "REPLACE INTO t VALUES (2, 2)", "ALTER TABLE t RENAME TO u"),
    *("EXPLAIN INSERT INTO t VALUES (1, 1)", "WITH x AS (VALUES (3)) DELETE FROM t", "PRAGMA schema_version = 77"),
]


def _database() -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.executescript("CREATE TABLE t (a, b); CREATE INDEX i ON t (a); INSERT INTO t VALUES (1, 1)")
    return connection


def _state(connection: sqlite3.Connection) -> list[object]:
    versions = ("schema_version", "user_version", "application_id")
    return [connection.total_changes, *(connection.execute(f"PRAGMA {it}").fetchone() for it in versions)]


def _runs(connection: sqlite3.Connection, sql: str) -> bool:
    """Whether SQLite accepts `sql` at all: much of what it is given here is another dialect's."""
    try:
        connection.execute(sql).fetchall()
    except (sqlite3.Error, sqlite3.Warning):
        return False
    return True


@pytest.mark.parametrize("sql", [sql for sql in EXECUTED if kind(sql) is Kind.READ])
def test_a_read_leaves_sqlite_unchanged(sql: str) -> None:
    """What is called a READ changes nothing in SQLite, which runs it with `query_only` on as well."""
    connection = _database()
    before = _state(connection)
    ran = _runs(connection, sql)
    assert _state(connection) == before
    assert not connection.in_transaction
    connection.execute("PRAGMA query_only = ON")
    assert _runs(connection, sql) is ran
    connection.close()


def test_what_changes_sqlite_is_no_read() -> None:
    """Every executed statement that leaves a trace was called a WRITE."""
    changed = set()
    for sql in EXECUTED:
        connection = _database()
        before = _state(connection)
        if _runs(connection, sql) and _state(connection) != before:
            changed.add(sql)
            assert kind(sql) is Kind.WRITE
        connection.close()
    assert len(changed) > 10


STEERED = [*EXECUTED, *TABLE[Kind.CONTROL]["sqlite"], *TABLE[Kind.CONTROL]["any"]]
# SQLite ignores the name and ends the transaction, where SQL Server returns to the savepoint SQLAlchemy named so.
STEERED.remove("ROLLBACK TRANSACTION sa_savepoint_1")


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("sql", STEERED)
def test_only_control_moves_sqlite_in_or_out_of_a_transaction(sql: str, begun: bool) -> None:
    """`in_transaction` flips for exactly the statements called CONTROL; savepoints are asked inside a transaction."""
    connection = _database()
    connection.execute("PRAGMA foreign_keys = ON")
    if begun:
        connection.execute("BEGIN")
        connection.execute("SAVEPOINT a")
    if (begun or kind(sql) is not Kind.SAVEPOINT) and _runs(connection, sql):
        assert (connection.in_transaction is not begun) is (kind(sql) is Kind.CONTROL)
    connection.close()


# --- cost ------------------------------------------------------------------------------------------------------------

MEGABYTE = 1_000_000
HANGS = 60.0  # seconds: no measure of speed, but what a scan that is more than linear goes far beyond
UNITS = r"""
('a;b', 1.5), |('a\n;', E'\'''b'), |(%(a__0)s); |/*|/*!|/*/|*/|/* ' */|--|#|[|[$|$a$ $b |$| $|$$|x$|'|\'|"|`|E'|e'|;|(|(
| |a|x |@|.|%(|BEGIN |BEGIN x; |END; |CREATE FUNCTION |TRIGGER |ANALYZE |(ANALYZE |EXPLAIN ANALYZE |FORMAT = x |INTO |
INTO @|(INSERT|SET STATEMENT |FOR |TO |AUTOCOMMIT |-- '"""
NASTY = [unit.removeprefix("\n") for unit in UNITS.split("|")]


def test_short_texts_are_remembered_long_ones_are_not() -> None:
    """A repeated statement costs one lookup, and no huge text is kept alive."""
    sql = f"SELECT {random.random()}"
    long = sql + " " * 5000
    assert kind(sql) is kind(long) is Kind.READ
    assert statements.known_kinds[sql] is Kind.READ
    assert long not in statements.known_kinds


def test_texts_that_never_come_again_do_not_pile_up() -> None:
    """An application that writes values into its texts takes no more memory with each."""
    for number in range(3000):
        kind(f"SELECT {number}")
    assert len(statements.known_kinds) <= 1024


@pytest.mark.parametrize("unit", NASTY)
@pytest.mark.parametrize("start", ["SELECT 1; ", "EXPLAIN ", "EXPLAIN (", "SET ", "BEGIN", "CREATE ", "PRAGMA "])
def test_time_is_linear_in_the_text(start: str, unit: str) -> None:
    """No text, however nasty, makes the scan more than linear: a quadratic one would take many times as long."""
    sql = start + unit * (MEGABYTE // 4 // len(unit)) + ";"
    begun = time.perf_counter()
    kind(sql)
    assert time.perf_counter() - begun < HANGS


def test_time_is_linear_in_dollar_tags_without_an_end() -> None:
    """Of many dollar quotes that are all left open, only the first is looked for."""
    sql = "SELECT 1; " + "".join(f"$a{number}$ " for number in range(MEGABYTE // 4 // 8))
    begun = time.perf_counter()
    kind(sql)
    assert time.perf_counter() - begun < HANGS
