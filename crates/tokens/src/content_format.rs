//! Does this template want the content of a message as a string or as a list of parts?
//!
//! vLLM reads that from the template: one that loops over the content of a message wants parts
//! (`_detect_content_format`, vLLM 0.32). The same question is asked here in the same way, because
//! a wrong answer is a wrong prompt.

use minijinja::machinery::ast::{Call, CallArg, Expr, Stmt};

use crate::messages::ContentFormat;

/// What a template assigns, loops over, defines and calls.
#[derive(Default)]
struct Facts<'a> {
    /// `{% set target = expr %}`; no target when it is no plain name.
    sets: Vec<(Option<&'a str>, &'a Expr<'a>)>,
    loops: Vec<Loop<'a>>,
    /// Name and parameters.
    macros: Vec<(&'a str, Vec<&'a str>)>,
    /// Name and arguments of calls of a plain name.
    calls: Vec<(&'a str, &'a [CallArg<'a>])>,
}

struct Loop<'a> {
    target: Option<&'a str>,
    iter: &'a Expr<'a>,
    /// The macros around it, as indices.
    macros: Vec<usize>,
}

/// The format that a parsed template wants.
pub(crate) fn detect(template: &Stmt<'_>) -> ContentFormat {
    let mut facts = Facts::default();
    facts.statement(template, &mut Vec::new());
    let mut names = vec!["messages"];
    let mut next = 0;
    while let Some(name) = names.get(next).copied() {
        next += 1;
        for (target, expr) in &facts.sets {
            if is_access(expr, name, None) {
                // vLLM gives up on a target that is no name, and then takes strings.
                let Some(target) = *target else { return ContentFormat::Text };
                if !names.contains(&target) {
                    names.push(target);
                }
            }
        }
    }
    let mut messages = Vec::new();
    for a_loop in &facts.loops {
        if names.iter().any(|name| is_access(a_loop.iter, name, None)) {
            let Some(target) = a_loop.target else { return ContentFormat::Text };
            messages.push(target);
        }
    }
    let found = facts.loops.iter().find(|a_loop| facts.loops_over_content(a_loop, &messages));
    match found {
        Some(Loop { target: Some(_), .. }) => ContentFormat::Parts,
        _ => ContentFormat::Text,
    }
}

impl<'a> Facts<'a> {
    fn loops_over_content(&self, a_loop: &Loop<'a>, messages: &[&str]) -> bool {
        if messages.iter().any(|name| is_access(a_loop.iter, name, Some("content"))) {
            return true;
        }
        let Expr::Var(iter) = a_loop.iter else { return false };
        match a_loop.macros.is_empty() {
            true => iter.id == "content",
            false => {
                let mut around = a_loop.macros.iter().filter_map(|index| self.macros.get(*index));
                around.any(|(name, params)| {
                    self.content_params(name, params, messages).contains(&iter.id)
                })
            }
        }
    }

    /// The parameters of a macro that some call passes the content of a message for.
    fn content_params(&self, name: &str, params: &[&'a str], messages: &[&str]) -> Vec<&'a str> {
        let is_content =
            |expr: &Expr<'_>| messages.iter().any(|name| is_access(expr, name, Some("content")));
        let mut found = Vec::new();
        for (_, args) in self.calls.iter().filter(|(called, _)| *called == name) {
            let mut position = 0;
            for arg in *args {
                match arg {
                    CallArg::Pos(expr) => {
                        if is_content(expr) {
                            found.extend(params.get(position));
                        }
                        position += 1;
                    }
                    CallArg::Kwarg(key, expr) if is_content(expr) => {
                        found.extend(params.iter().find(|param| *param == key));
                    }
                    _ => {}
                }
            }
        }
        found
    }

    fn statements(&mut self, list: &'a [Stmt<'a>], macros: &mut Vec<usize>) {
        for statement in list {
            self.statement(statement, macros);
        }
    }

    fn statement(&mut self, statement: &'a Stmt<'a>, macros: &mut Vec<usize>) {
        match statement {
            Stmt::Template(template) => self.statements(&template.children, macros),
            Stmt::EmitExpr(emit) => self.expr(&emit.expr),
            Stmt::ForLoop(a_loop) => {
                let target = name_of(&a_loop.target);
                self.loops.push(Loop { target, iter: &a_loop.iter, macros: macros.clone() });
                self.expr(&a_loop.iter);
                self.exprs(&a_loop.filter_expr);
                self.statements(&a_loop.body, macros);
                self.statements(&a_loop.else_body, macros);
            }
            Stmt::IfCond(cond) => {
                self.expr(&cond.expr);
                self.statements(&cond.true_body, macros);
                self.statements(&cond.false_body, macros);
            }
            Stmt::WithBlock(with) => {
                with.assignments.iter().for_each(|(_, expr)| self.expr(expr));
                self.statements(&with.body, macros);
            }
            Stmt::Set(set) => {
                self.sets.push((name_of(&set.target), &set.expr));
                self.expr(&set.expr);
            }
            Stmt::SetBlock(set) => self.statements(&set.body, macros),
            Stmt::AutoEscape(block) => self.statements(&block.body, macros),
            Stmt::FilterBlock(block) => self.statements(&block.body, macros),
            Stmt::Macro(a_macro) => {
                let params = a_macro.args.iter().filter_map(name_of).collect();
                macros.push(self.macros.len());
                self.macros.push((a_macro.name, params));
                self.statements(&a_macro.body, macros);
                macros.pop();
            }
            Stmt::CallBlock(block) => {
                self.call(&block.call);
                self.statements(&block.macro_decl.body, macros);
            }
            Stmt::Do(call) => self.call(&call.call),
            _ => {}
        }
    }

    fn exprs(&mut self, list: impl IntoIterator<Item = &'a Expr<'a>>) {
        list.into_iter().for_each(|expr| self.expr(expr));
    }

    fn call(&mut self, call: &'a Call<'a>) {
        if let Expr::Var(name) = &call.expr {
            self.calls.push((name.id, &call.args));
        }
        self.expr(&call.expr);
        self.args(&call.args);
    }

    fn args(&mut self, args: &'a [CallArg<'a>]) {
        for arg in args {
            match arg {
                CallArg::Pos(expr)
                | CallArg::Kwarg(_, expr)
                | CallArg::PosSplat(expr)
                | CallArg::KwargSplat(expr) => self.expr(expr),
            }
        }
    }

    fn expr(&mut self, expr: &'a Expr<'a>) {
        match expr {
            Expr::Var(_) | Expr::Const(_) => {}
            Expr::Slice(slice) => {
                self.expr(&slice.expr);
                let parts = [&slice.start, &slice.stop, &slice.step];
                self.exprs(parts.into_iter().flatten());
            }
            Expr::UnaryOp(op) => self.expr(&op.expr),
            Expr::BinOp(op) => self.exprs([&op.left, &op.right]),
            Expr::Compare(compare) => {
                self.expr(&compare.expr);
                self.exprs(compare.ops.iter().map(|op| &op.expr));
            }
            Expr::IfExpr(cond) => {
                self.exprs([&cond.test_expr, &cond.true_expr]);
                self.exprs(&cond.false_expr);
            }
            Expr::Filter(filter) => {
                self.exprs(&filter.expr);
                self.args(&filter.args);
            }
            Expr::Test(test) => {
                self.expr(&test.expr);
                self.args(&test.args);
            }
            Expr::GetAttr(get) => self.expr(&get.expr),
            Expr::GetItem(get) => self.exprs([&get.expr, &get.subscript_expr]),
            Expr::Call(call) => self.call(call),
            Expr::List(list) => self.exprs(&list.items),
            Expr::Tuple(tuple) => self.exprs(&tuple.items),
            Expr::Map(map) => self.exprs(map.keys.iter().chain(&map.values)),
        }
    }
}

fn name_of<'a>(expr: &Expr<'a>) -> Option<&'a str> {
    match expr {
        Expr::Var(var) => Some(var.id),
        _ => None,
    }
}

/// Whether `expr` is the variable `name`, or its item `key`, seen through filters, tests and
/// slices.
fn is_access(expr: &Expr<'_>, name: &str, key: Option<&str>) -> bool {
    match (expr, key) {
        (Expr::Filter(filter), _) => {
            filter.expr.as_ref().is_some_and(|inner| is_access(inner, name, key))
        }
        (Expr::Test(test), _) => is_access(&test.expr, name, key),
        (Expr::Slice(slice), _) => is_access(&slice.expr, name, key),
        (_, None) => name_of(expr) == Some(name),
        (Expr::GetItem(get), Some(key)) => {
            let is_key = |expr: &Expr<'_>| match expr {
                Expr::Const(value) => value.value.as_str() == Some(key),
                _ => false,
            };
            name_of(&get.expr) == Some(name) && is_key(&get.subscript_expr)
        }
        (Expr::GetAttr(get), Some(key)) => name_of(&get.expr) == Some(name) && get.name == key,
        _ => false,
    }
}
