//! The parsed template.

use std::rc::Rc;

use super::filters::Filter;
use super::builtins::Test;
use super::value::Value;

/// A statement and the line where it begins.
pub(super) struct Stmt {
    pub line: u32,
    pub kind: StmtKind,
}

pub(super) enum StmtKind {
    /// Text as it stands.
    Data(String),
    /// `{{ ... }}`
    Emit(Expr),
    /// Conditions with their bodies, then the `else` body.
    If(Vec<(Expr, Vec<Stmt>)>, Vec<Stmt>),
    For(Box<For>),
    Set(Vec<Target>, Expr),
    /// `{% set x %}...{% endset %}`, with filters.
    SetBlock(Target, Vec<FilterCall>, Vec<Stmt>),
    Macro(Rc<Macro>),
    With(Vec<(Rc<str>, Expr)>, Vec<Stmt>),
    /// `{% filter ... %}...{% endfilter %}`
    Filter(Vec<FilterCall>, Vec<Stmt>),
    /// A body without meaning of its own: `{% generation %}`.
    Group(Vec<Stmt>),
    Break,
    Continue,
}

pub(super) struct For {
    pub targets: Vec<Rc<str>>,
    pub items: Expr,
    pub condition: Option<Expr>,
    pub body: Vec<Stmt>,
    pub otherwise: Vec<Stmt>,
}

pub(super) struct Macro {
    pub name: Rc<str>,
    /// Parameters with their defaults.
    pub parameters: Vec<(Rc<str>, Option<Expr>)>,
    pub body: Vec<Stmt>,
}

/// What `set` assigns to.
pub(super) enum Target {
    Name(Rc<str>),
    /// An attribute of a namespace.
    Attribute(Rc<str>, Rc<str>),
}

/// An expression, the line where it begins, and how deeply it is nested.
pub(super) struct Expr {
    pub line: u32,
    pub depth: usize,
    pub kind: Box<ExprKind>,
}

pub(super) enum ExprKind {
    Constant(Value),
    Name(Rc<str>),
    List(Vec<Expr>),
    Map(Vec<(Expr, Expr)>),
    Attribute(Expr, Rc<str>),
    Item(Expr, Expr),
    Slice(Expr, [Option<Expr>; 3]),
    Call(Expr, Arguments),
    Filter(Expr, FilterCall),
    /// With `true`: `is not`.
    Test(Expr, TestCall, bool),
    Not(Expr),
    Negative(Expr),
    Positive(Expr),
    And(Expr, Expr),
    Or(Expr, Expr),
    Binary(Binary, Expr, Expr),
    /// `a < b <= c`
    Compare(Expr, Vec<(Comparison, Expr)>),
    /// `a if condition else b`
    Choice { condition: Expr, yes: Expr, no: Option<Expr> },
}

#[derive(Clone, Copy)]
pub(super) enum Binary {
    Add,
    Subtract,
    Multiply,
    Divide,
    FloorDivide,
    Remainder,
    Power,
    /// `~`
    Join,
}

#[derive(Clone, Copy)]
pub(super) enum Comparison {
    Equal,
    NotEqual,
    Less,
    LessEqual,
    Greater,
    GreaterEqual,
    In,
    NotIn,
}

#[derive(Default)]
pub(super) struct Arguments {
    pub positional: Vec<Expr>,
    pub named: Vec<(Rc<str>, Expr)>,
}

pub(super) struct FilterCall {
    pub filter: Filter,
    pub arguments: Arguments,
}

pub(super) struct TestCall {
    pub test: Test,
    pub arguments: Arguments,
}
