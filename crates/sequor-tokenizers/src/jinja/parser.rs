//! Tokens to statements and expressions, with Jinja's precedences.

use std::rc::Rc;

use super::ast::{
    Arguments, Binary, Comparison, Expr, ExprKind, FilterCall, For, Macro, Stmt, StmtKind, Target, TestCall,
};
use super::builtins::Test;
use super::filters::Filter;
use super::lexer::{Token, lex};
use super::value::Value;
use super::{Fault, Result};

/// Deepest nesting of expressions and of statements.
const MAX_DEPTH: usize = 80;

/// Parses a whole template.
pub(super) fn parse(source: &str) -> Result<Vec<Stmt>> {
    let mut parser = Parser { tokens: lex(source)?, at: 0, depth: 0, loops: 0 };
    let body = parser.body(&[])?;
    Ok(body)
}

struct Parser {
    tokens: Vec<(Token, u32)>,
    at: usize,
    depth: usize,
    /// Loops around the present statement.
    loops: usize,
}

impl Parser {
    fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.at).map(|(token, _)| token)
    }

    fn line(&self) -> u32 {
        self.tokens.get(self.at).or(self.tokens.last()).map_or(1, |(_, line)| *line)
    }

    fn advance(&mut self) -> Option<Token> {
        let token = self.tokens.get(self.at)?.0.clone();
        self.at += 1;
        Some(token)
    }

    fn fault<T>(&self, reason: impl Into<String>) -> Result<T> {
        Err(Fault::new(reason).at(self.line()))
    }

    /// The mistake that `wanted` is not here.
    fn unexpected<T>(&self, wanted: &str) -> Result<T> {
        let found = match self.peek() {
            None => "the end of the template".to_owned(),
            Some(Token::Data(_) | Token::BlockStart | Token::VariableStart) => "text".to_owned(),
            Some(Token::BlockEnd | Token::VariableEnd) => "the end of the tag".to_owned(),
            Some(Token::Name(name)) => format!("{name:?}"),
            Some(Token::Str(_)) => "a string".to_owned(),
            Some(Token::Int(_) | Token::Float(_)) => "a number".to_owned(),
            Some(Token::Op(op)) => format!("{op:?}"),
        };
        self.fault(format!("expected {wanted}, found {found}"))
    }

    fn skip_op(&mut self, op: &str) -> bool {
        let found = matches!(self.peek(), Some(Token::Op(o)) if *o == op);
        self.at += usize::from(found);
        found
    }

    fn expect_op(&mut self, op: &str) -> Result<()> {
        if self.skip_op(op) { Ok(()) } else { self.unexpected(&format!("{op:?}")) }
    }

    fn is_name(&self, name: &str) -> bool {
        matches!(self.peek(), Some(Token::Name(n)) if n == name)
    }

    fn skip_name(&mut self, name: &str) -> bool {
        let found = self.is_name(name);
        self.at += usize::from(found);
        found
    }

    fn name(&mut self, wanted: &str) -> Result<Rc<str>> {
        match self.peek() {
            Some(Token::Name(name)) => {
                let name = Rc::from(name.as_str());
                self.at += 1;
                Ok(name)
            }
            _ => self.unexpected(wanted),
        }
    }

    fn expect_block_end(&mut self) -> Result<()> {
        if self.peek() == Some(&Token::BlockEnd) {
            self.at += 1;
            Ok(())
        } else {
            self.unexpected("the end of the tag")
        }
    }

    fn nested<T>(&mut self, then: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        if self.depth >= MAX_DEPTH {
            return self.fault(format!("nested more than {MAX_DEPTH} levels deep"));
        }
        self.depth += 1;
        let result = then(self);
        self.depth -= 1;
        result
    }

    // Statements.

    /// Statements up to a block that begins with one of `ends` (left in place,
    /// after its `{%`), or up to the end of the template when there are none.
    fn body(&mut self, ends: &[&str]) -> Result<Vec<Stmt>> {
        let mut body = Vec::new();
        loop {
            let line = self.line();
            let kind = match self.advance() {
                None if ends.is_empty() => return Ok(body),
                None => return self.fault(format!("the template ends before {{% {} %}}", ends.join(" or "))),
                Some(Token::Data(text)) => StmtKind::Data(text),
                Some(Token::VariableStart) => {
                    let expr = self.tuple(true)?;
                    if self.advance() != Some(Token::VariableEnd) {
                        self.at -= 1;
                        return self.unexpected("the end of the tag");
                    }
                    StmtKind::Emit(expr)
                }
                Some(Token::BlockStart) => {
                    if ends.iter().any(|end| self.is_name(end)) {
                        return Ok(body);
                    }
                    self.nested(Self::block)?
                }
                Some(_) => {
                    self.at -= 1;
                    return self.unexpected("text or a tag");
                }
            };
            body.push(Stmt { line, kind });
        }
    }

    /// The statement of a block; its `{%` is behind us.
    fn block(&mut self) -> Result<StmtKind> {
        let name = self.name("the name of a block")?;
        match &*name {
            "if" => self.if_block(),
            "for" => self.for_block(),
            "set" => self.set_block(),
            "macro" => self.macro_block(),
            "with" => self.with_block(),
            "filter" => {
                let filters = self.filter_chain()?;
                Ok(StmtKind::Filter(filters, self.body_until("endfilter")?))
            }
            "generation" => Ok(StmtKind::Group(self.body_until("endgeneration")?)),
            "break" | "continue" if self.loops == 0 => self.fault(format!("{name:?} is outside of a loop")),
            "break" => self.expect_block_end().map(|()| StmtKind::Break),
            "continue" => self.expect_block_end().map(|()| StmtKind::Continue),
            "include" | "import" | "from" | "extends" | "block" | "call" | "do" | "autoescape" => {
                self.fault(format!("{{% {name} %}} is not supported in chat templates"))
            }
            _ => self.fault(format!("unexpected block {name:?}")),
        }
    }

    /// The end of the tag, statements, and the block that ends them.
    fn body_until(&mut self, end: &str) -> Result<Vec<Stmt>> {
        self.expect_block_end()?;
        let body = self.body(&[end])?;
        self.at += 1;
        self.expect_block_end()?;
        Ok(body)
    }

    fn if_block(&mut self) -> Result<StmtKind> {
        let mut branches = Vec::new();
        loop {
            let condition = self.tuple(true)?;
            self.expect_block_end()?;
            branches.push((condition, self.body(&["elif", "else", "endif"])?));
            if self.skip_name("elif") {
                continue;
            }
            let otherwise = if self.skip_name("else") { self.body_until("endif")? } else { Vec::new() };
            if self.skip_name("endif") {
                self.expect_block_end()?;
            }
            return Ok(StmtKind::If(branches, otherwise));
        }
    }

    fn for_block(&mut self) -> Result<StmtKind> {
        let parenthesised = self.skip_op("(");
        let mut targets = vec![self.name("a loop variable")?];
        while self.skip_op(",") {
            targets.push(self.name("a loop variable")?);
        }
        if parenthesised {
            self.expect_op(")")?;
        }
        if !self.skip_name("in") {
            return self.unexpected("\"in\"");
        }
        // A condition after the items belongs to the loop.
        let items = self.tuple(false)?;
        let condition = if self.skip_name("if") { Some(self.expression()?) } else { None };
        if self.is_name("recursive") {
            return self.fault("recursive loops are not supported in chat templates");
        }
        self.expect_block_end()?;
        self.loops += 1;
        let body = self.body(&["else", "endfor"]);
        self.loops -= 1;
        let body = body?;
        let otherwise = if self.skip_name("else") { self.body_until("endfor")? } else { Vec::new() };
        if self.skip_name("endfor") {
            self.expect_block_end()?;
        }
        Ok(StmtKind::For(Box::new(For { targets, items, condition, body, otherwise })))
    }

    fn target(&mut self) -> Result<Target> {
        let name = self.name("a variable")?;
        if self.skip_op(".") {
            return Ok(Target::Attribute(name, self.name("an attribute")?));
        }
        Ok(Target::Name(name))
    }

    fn set_block(&mut self) -> Result<StmtKind> {
        let mut targets = vec![self.target()?];
        while self.skip_op(",") {
            targets.push(self.target()?);
        }
        if self.skip_op("=") {
            let value = self.tuple(true)?;
            self.expect_block_end()?;
            return Ok(StmtKind::Set(targets, value));
        }
        let filters = if self.skip_op("|") { self.filter_chain()? } else { Vec::new() };
        match <[Target; 1]>::try_from(targets) {
            Ok([target]) => Ok(StmtKind::SetBlock(target, filters, self.body_until("endset")?)),
            Err(_) => self.unexpected("\"=\""),
        }
    }

    fn macro_block(&mut self) -> Result<StmtKind> {
        let name = self.name("the name of the macro")?;
        self.expect_op("(")?;
        let mut parameters = Vec::new();
        while !self.skip_op(")") {
            let parameter = self.name("a parameter")?;
            let default = if self.skip_op("=") { Some(self.expression()?) } else { None };
            parameters.push((parameter, default));
            if !self.skip_op(",") {
                self.expect_op(")")?;
                break;
            }
        }
        let loops = std::mem::take(&mut self.loops);
        let body = self.body_until("endmacro");
        self.loops = loops;
        Ok(StmtKind::Macro(Rc::new(Macro { name, parameters, body: body? })))
    }

    fn with_block(&mut self) -> Result<StmtKind> {
        let mut variables = Vec::new();
        while self.peek() != Some(&Token::BlockEnd) {
            let name = self.name("a variable")?;
            self.expect_op("=")?;
            variables.push((name, self.expression()?));
            if !self.skip_op(",") {
                break;
            }
        }
        Ok(StmtKind::With(variables, self.body_until("endwith")?))
    }

    // Expressions, from the loosest binding to the tightest.

    fn expr(&self, line: u32, children: &[&Expr], kind: impl FnOnce() -> ExprKind) -> Result<Expr> {
        let depth = 1 + children.iter().map(|e| e.depth).max().unwrap_or(0);
        if depth > MAX_DEPTH {
            return self.fault(format!("an expression has more than {MAX_DEPTH} parts in a row; split it up with set"));
        }
        Ok(Expr { line, depth, kind: Box::new(kind()) })
    }

    /// An expression, or several with commas between, which make a list.
    fn tuple(&mut self, with_choice: bool) -> Result<Expr> {
        let line = self.line();
        let one = |p: &mut Self| if with_choice { p.expression() } else { p.nested(Self::or) };
        let first = one(self)?;
        if !matches!(self.peek(), Some(Token::Op(","))) {
            return Ok(first);
        }
        let mut items = vec![first];
        while self.skip_op(",") {
            if matches!(self.peek(), Some(Token::BlockEnd | Token::VariableEnd | Token::Op(")")) | None) {
                break;
            }
            items.push(one(self)?);
        }
        self.list(line, items)
    }

    fn list(&self, line: u32, items: Vec<Expr>) -> Result<Expr> {
        let depth = 1 + items.iter().map(|e| e.depth).max().unwrap_or(0);
        let mut list = self.expr(line, &[], || ExprKind::List(items))?;
        list.depth = depth;
        if depth > MAX_DEPTH { self.fault("lists are nested too deeply") } else { Ok(list) }
    }

    fn expression(&mut self) -> Result<Expr> {
        self.nested(|p| {
            let line = p.line();
            let mut value = p.or()?;
            while p.skip_name("if") {
                let condition = p.or()?;
                let no = if p.skip_name("else") { Some(p.expression()?) } else { None };
                let depth = value.depth.max(condition.depth).max(no.as_ref().map_or(0, |e| e.depth));
                value = p.expr(line, &[], || ExprKind::Choice { condition, yes: value, no })?;
                value.depth += depth;
                if value.depth > MAX_DEPTH {
                    return p.fault("choices are nested too deeply");
                }
            }
            Ok(value)
        })
    }

    /// Left-associative operators over `next`.
    fn chain(
        &mut self,
        next: fn(&mut Self) -> Result<Expr>,
        operator: fn(&mut Self) -> Option<fn(Expr, Expr) -> ExprKind>,
    ) -> Result<Expr> {
        let line = self.line();
        let mut left = next(self)?;
        while let Some(make) = operator(self) {
            let right = next(self)?;
            let depth = left.depth.max(right.depth);
            left = self.expr(line, &[], || make(left, right))?;
            left.depth += depth;
            if left.depth > MAX_DEPTH {
                return self.fault(format!("an expression has more than {MAX_DEPTH} parts in a row"));
            }
        }
        Ok(left)
    }

    fn or(&mut self) -> Result<Expr> {
        self.chain(Self::and, |p| p.skip_name("or").then_some(ExprKind::Or as fn(Expr, Expr) -> ExprKind))
    }

    fn and(&mut self) -> Result<Expr> {
        self.chain(Self::not, |p| p.skip_name("and").then_some(ExprKind::And as fn(Expr, Expr) -> ExprKind))
    }

    fn not(&mut self) -> Result<Expr> {
        let line = self.line();
        if self.skip_name("not") {
            let inner = self.nested(Self::not)?;
            let depth = inner.depth;
            let mut expr = self.expr(line, &[], || ExprKind::Not(inner))?;
            expr.depth += depth;
            return Ok(expr);
        }
        self.compare()
    }

    fn compare(&mut self) -> Result<Expr> {
        let line = self.line();
        let first = self.sum()?;
        let mut rest = Vec::new();
        loop {
            let comparison = match self.peek() {
                Some(Token::Op("==")) => Comparison::Equal,
                Some(Token::Op("!=")) => Comparison::NotEqual,
                Some(Token::Op("<")) => Comparison::Less,
                Some(Token::Op("<=")) => Comparison::LessEqual,
                Some(Token::Op(">")) => Comparison::Greater,
                Some(Token::Op(">=")) => Comparison::GreaterEqual,
                Some(Token::Name(n)) if n == "in" => Comparison::In,
                Some(Token::Name(n)) if n == "not" && self.next_is_in() => {
                    self.at += 1;
                    Comparison::NotIn
                }
                _ => break,
            };
            self.at += 1;
            rest.push((comparison, self.sum()?));
        }
        if rest.is_empty() {
            return Ok(first);
        }
        let depth = rest.iter().map(|(_, e)| e.depth).max().unwrap_or(0).max(first.depth);
        let mut expr = self.expr(line, &[], || ExprKind::Compare(first, rest))?;
        expr.depth += depth;
        Ok(expr)
    }

    fn next_is_in(&self) -> bool {
        matches!(self.tokens.get(self.at + 1), Some((Token::Name(n), _)) if n == "in")
    }

    fn sum(&mut self) -> Result<Expr> {
        self.chain(Self::join, |p| {
            if p.skip_op("+") {
                Some(|a, b| ExprKind::Binary(Binary::Add, a, b))
            } else if p.skip_op("-") {
                Some(|a, b| ExprKind::Binary(Binary::Subtract, a, b))
            } else {
                None
            }
        })
    }

    fn join(&mut self) -> Result<Expr> {
        self.chain(Self::product, |p| {
            p.skip_op("~").then_some((|a, b| ExprKind::Binary(Binary::Join, a, b)) as fn(Expr, Expr) -> ExprKind)
        })
    }

    fn product(&mut self) -> Result<Expr> {
        self.chain(Self::power, |p| {
            if p.skip_op("*") {
                Some(|a, b| ExprKind::Binary(Binary::Multiply, a, b))
            } else if p.skip_op("//") {
                Some(|a, b| ExprKind::Binary(Binary::FloorDivide, a, b))
            } else if p.skip_op("/") {
                Some(|a, b| ExprKind::Binary(Binary::Divide, a, b))
            } else if p.skip_op("%") {
                Some(|a, b| ExprKind::Binary(Binary::Remainder, a, b))
            } else {
                None
            }
        })
    }

    fn power(&mut self) -> Result<Expr> {
        self.chain(
            |p| p.unary(true),
            |p| p.skip_op("**").then_some((|a, b| ExprKind::Binary(Binary::Power, a, b)) as fn(Expr, Expr) -> ExprKind),
        )
    }

    fn unary(&mut self, with_filters: bool) -> Result<Expr> {
        let line = self.line();
        let sign = match self.peek() {
            Some(Token::Op("-")) => Some(ExprKind::Negative as fn(Expr) -> ExprKind),
            Some(Token::Op("+")) => Some(ExprKind::Positive as fn(Expr) -> ExprKind),
            _ => None,
        };
        let mut expr = if let Some(make) = sign {
            self.at += 1;
            let inner = self.nested(|p| p.unary(false))?;
            let depth = inner.depth;
            let mut expr = self.expr(line, &[], || make(inner))?;
            expr.depth += depth;
            expr
        } else {
            self.primary()?
        };
        expr = self.postfix(expr)?;
        if with_filters { self.filtered(expr) } else { Ok(expr) }
    }

    fn primary(&mut self) -> Result<Expr> {
        let line = self.line();
        let kind = match self.advance() {
            Some(Token::Name(name)) => match name.as_str() {
                "true" | "True" => ExprKind::Constant(Value::Bool(true)),
                "false" | "False" => ExprKind::Constant(Value::Bool(false)),
                "none" | "None" => ExprKind::Constant(Value::None),
                "if" | "else" | "elif" | "and" | "or" | "in" | "is" | "not" => {
                    self.at -= 1;
                    return self.unexpected("a value");
                }
                _ => ExprKind::Name(Rc::from(name)),
            },
            Some(Token::Str(mut text)) => {
                // Strings that follow one another are one.
                while let Some(Token::Str(more)) = self.peek() {
                    text.push_str(more);
                    self.at += 1;
                }
                ExprKind::Constant(text.into())
            }
            Some(Token::Int(n)) => ExprKind::Constant(Value::Int(n)),
            Some(Token::Float(x)) => ExprKind::Constant(Value::Float(x)),
            Some(Token::Op("(")) => {
                if self.skip_op(")") {
                    return self.list(line, Vec::new());
                }
                let inner = self.tuple(true)?;
                self.expect_op(")")?;
                return Ok(inner);
            }
            Some(Token::Op("[")) => {
                let mut items = Vec::new();
                while !self.skip_op("]") {
                    items.push(self.expression()?);
                    if !self.skip_op(",") {
                        self.expect_op("]")?;
                        break;
                    }
                }
                return self.list(line, items);
            }
            Some(Token::Op("{")) => return self.map(line),
            _ => {
                self.at = self.at.saturating_sub(usize::from(self.at < self.tokens.len() + 1 && self.at > 0));
                return self.unexpected("a value");
            }
        };
        self.expr(line, &[], || kind)
    }

    fn map(&mut self, line: u32) -> Result<Expr> {
        let mut entries = Vec::new();
        while !self.skip_op("}") {
            let key = self.expression()?;
            self.expect_op(":")?;
            entries.push((key, self.expression()?));
            if !self.skip_op(",") {
                self.expect_op("}")?;
                break;
            }
        }
        let depth = entries.iter().map(|(k, v)| k.depth.max(v.depth)).max().unwrap_or(0);
        let mut expr = self.expr(line, &[], || ExprKind::Map(entries))?;
        expr.depth += depth;
        if expr.depth > MAX_DEPTH { self.fault("mappings are nested too deeply") } else { Ok(expr) }
    }

    /// Attributes, items and calls.
    fn postfix(&mut self, mut expr: Expr) -> Result<Expr> {
        loop {
            let line = self.line();
            let inner = expr.depth;
            let (kind, depth) = if self.skip_op(".") {
                match self.advance() {
                    Some(Token::Name(name)) => (ExprKind::Attribute(expr, name.into()), 0),
                    Some(Token::Int(n)) => {
                        let index = self.expr(line, &[], || ExprKind::Constant(Value::Int(n)))?;
                        (ExprKind::Item(expr, index), 1)
                    }
                    _ => {
                        self.at -= 1;
                        return self.unexpected("an attribute");
                    }
                }
            } else if self.skip_op("[") {
                self.subscript(expr)?
            } else if self.skip_op("(") {
                let arguments = self.arguments()?;
                let depth = arguments.depth();
                (ExprKind::Call(expr, arguments), depth)
            } else {
                return Ok(expr);
            };
            expr = self.deeper(line, kind, inner.max(depth))?;
        }
    }

    /// An expression around others of at most `depth`.
    fn deeper(&self, line: u32, kind: ExprKind, depth: usize) -> Result<Expr> {
        if depth >= MAX_DEPTH {
            return self.fault(format!("an expression has more than {MAX_DEPTH} parts in a row"));
        }
        Ok(Expr { line, depth: depth + 1, kind: Box::new(kind) })
    }

    /// An item or a slice; the bracket is behind us.
    fn subscript(&mut self, expr: Expr) -> Result<(ExprKind, usize)> {
        let mut parts: [Option<Expr>; 3] = [None, None, None];
        let mut colons = 0;
        for part in &mut parts {
            if !matches!(self.peek(), Some(Token::Op(":" | "]"))) {
                *part = Some(self.tuple(true)?);
            }
            if !self.skip_op(":") {
                break;
            }
            colons += 1;
        }
        self.expect_op("]")?;
        let depth = parts.iter().flatten().map(|e| e.depth).max().unwrap_or(0);
        match (colons, parts) {
            (0, [Some(index), ..]) => Ok((ExprKind::Item(expr, index), depth)),
            (0, _) => self.unexpected("an index"),
            (_, parts) => Ok((ExprKind::Slice(expr, parts), depth)),
        }
    }

    /// Arguments of a call; the parenthesis is behind us.
    fn arguments(&mut self) -> Result<Arguments> {
        let mut arguments = Arguments::default();
        while !self.skip_op(")") {
            if matches!(self.peek(), Some(Token::Op("*" | "**"))) {
                return self.fault("unpacked arguments are not supported in chat templates");
            }
            let next = self.tokens.get(self.at + 1).map(|(token, _)| token);
            if let (Some(Token::Name(name)), Some(Token::Op("="))) = (self.peek(), next) {
                let name = Rc::from(name.as_str());
                self.at += 2;
                arguments.named.push((name, self.expression()?));
            } else {
                arguments.positional.push(self.expression()?);
            }
            if !self.skip_op(",") {
                self.expect_op(")")?;
                break;
            }
        }
        Ok(arguments)
    }

    /// Filters, tests, and calls of what they give.
    fn filtered(&mut self, mut expr: Expr) -> Result<Expr> {
        loop {
            let line = self.line();
            let inner = expr.depth;
            if self.skip_op("|") {
                let call = self.filter()?;
                let depth = inner.max(call.arguments.depth());
                expr = self.deeper(line, ExprKind::Filter(expr, call), depth)?;
            } else if self.skip_name("is") {
                let negated = self.skip_name("not");
                let call = self.test()?;
                let depth = inner.max(call.arguments.depth());
                expr = self.deeper(line, ExprKind::Test(expr, call, negated), depth)?;
            } else if self.skip_op("(") {
                let arguments = self.arguments()?;
                let depth = inner.max(arguments.depth());
                expr = self.deeper(line, ExprKind::Call(expr, arguments), depth)?;
            } else {
                return Ok(expr);
            }
        }
    }

    fn filter(&mut self) -> Result<FilterCall> {
        let line = self.line();
        let name = self.name("a filter")?;
        let Some(filter) = Filter::named(&name) else {
            return Err(Fault::new(format!("there is no filter {name:?} in chat templates")).at(line));
        };
        let arguments = if self.skip_op("(") { self.arguments()? } else { Arguments::default() };
        Ok(FilterCall { filter, arguments })
    }

    fn filter_chain(&mut self) -> Result<Vec<FilterCall>> {
        let mut filters = vec![self.filter()?];
        while self.skip_op("|") {
            filters.push(self.filter()?);
        }
        Ok(filters)
    }

    fn test(&mut self) -> Result<TestCall> {
        let line = self.line();
        let name = self.name("a test")?;
        let Some(test) = Test::named(&name) else {
            return Err(Fault::new(format!("there is no test {name:?} in chat templates")).at(line));
        };
        let mut arguments = Arguments::default();
        let argument_follows = match self.peek() {
            Some(Token::Name(name)) => !matches!(name.as_str(), "else" | "or" | "and" | "if" | "is" | "in" | "not"),
            Some(Token::Str(_) | Token::Int(_) | Token::Float(_) | Token::Op("[" | "{")) => true,
            _ => false,
        };
        if self.skip_op("(") {
            arguments = self.arguments()?;
        } else if argument_follows {
            let primary = self.primary()?;
            arguments.positional.push(self.postfix(primary)?);
        }
        Ok(TestCall { test, arguments })
    }
}

impl Arguments {
    fn depth(&self) -> usize {
        let named = self.named.iter().map(|(_, e)| e.depth);
        self.positional.iter().map(|e| e.depth).chain(named).max().unwrap_or(0)
    }
}
