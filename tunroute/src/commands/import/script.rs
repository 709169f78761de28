//! What a shell script would do to rules and routes.
//!
//! Commands are followed in their order, with the values of variables and arguments that the script itself gives. A value
//! that depends on anything else makes the command one that is noted, not guessed. Both branches of a condition are
//! taken; a variable that is assigned in one of them has no known value after it.

use std::{
    collections::{BTreeSet, HashMap},
    rc::Rc,
};

use super::{
    Origin, Setup,
    iproute::{Request, request},
    shell::{Command, Item, Operator, Part, Redirect, Word, is_name, lex},
    tables::names,
};
use crate::policy::net::Family;

/// Functions, loops and scripts in scripts are followed to this depth.
const DEEPEST: usize = 24;
/// The number of commands that are followed in one file.
const MOST_COMMANDS: usize = 100_000;

/// Reads a file that a script names; none if it cannot be read.
pub type ReadFile<'r> = &'r dyn Fn(&str) -> Option<String>;

/// Programs that run the command after their options: their options with a value, and the number of words between.
const WRAPPERS: [(&str, &[&str], usize); 13] = [
    ("sudo", &["-u", "-g", "-h", "-p", "-C", "-T", "-r", "-t"], 0),
    ("doas", &["-u", "-C"], 0),
    ("env", &["-u", "-C"], 0),
    ("command", &[], 0),
    ("builtin", &[], 0),
    ("exec", &["-a"], 0),
    ("nice", &["-n"], 0),
    ("ionice", &["-c", "-n"], 0),
    ("nohup", &[], 0),
    ("chronic", &[], 0),
    ("time", &["-f", "-o"], 0),
    ("busybox", &[], 0),
    ("timeout", &["-k", "-s"], 1),
];
/// Commands that only print their arguments, or look for them.
const PRINTING: [&str; 8] = ["logger", "grep", "egrep", "fgrep", "test", "[", "[[", ":"];
const SHELLS: [&str; 6] = ["sh", "bash", "dash", "ash", "ksh", "zsh"];

/// A word after expansion.
#[derive(Clone)]
struct Field {
    text: String,
    /// It is not what the script would see: some variable has no known value.
    is_unknown: bool,
}

/// A script that is being followed.
pub(super) struct Script<'r> {
    setup: &'r mut Setup,
    file: &'r str,
    read: ReadFile<'r>,
    /// Values, or none if they are not known.
    variables: HashMap<String, Option<String>>,
    functions: HashMap<String, Rc<[Item]>>,
    called: BTreeSet<String>,
    /// The arguments of the function or the script, or none if they are not known.
    arguments: Option<Vec<Option<String>>>,
    /// For each block that may run or not: the variables assigned in it.
    blocks: Vec<Vec<String>>,
    depth: usize,
    /// Commands that may still be followed.
    budget: usize,
    /// The input of the next command in a pipeline has been read.
    is_input_read: bool,
}

impl<'r> Script<'r> {
    pub(super) fn new(setup: &'r mut Setup, file: &'r str, read: ReadFile<'r>) -> Self {
        Self {
            setup,
            file,
            read,
            variables: HashMap::new(),
            functions: HashMap::new(),
            called: BTreeSet::new(),
            arguments: None,
            blocks: Vec::new(),
            depth: 0,
            budget: MOST_COMMANDS,
            is_input_read: false,
        }
    }

    /// Gives a variable its value.
    pub(super) fn set(&mut self, name: &str, value: &str) {
        self.variables.insert(name.to_owned(), Some(value.to_owned()));
    }

    /// Follows a text that begins on this line of the file. Functions that it does not call are followed at the end, as
    /// something else may call them.
    pub(super) fn run(&mut self, text: &str, line: usize) {
        self.items(&lex(text, line));
        let left = self.functions.iter().filter(|(name, _)| !self.called.contains(*name));
        let mut left: Vec<(String, Rc<[Item]>)> = left.map(|(name, body)| (name.clone(), Rc::clone(body))).collect();
        left.sort_by(|a, b| a.0.cmp(&b.0));
        for (_, body) in left {
            self.blocks.push(Vec::new());
            self.items(&body);
            self.end_block();
        }
    }

    fn origin(&self, line: usize, words: &[Field]) -> Origin {
        let words: Vec<&str> = words.iter().map(|word| word.text.as_str()).collect();
        Origin { place: Some((self.file.to_owned(), line)), command: words.join(" ") }
    }

    fn note(&mut self, why: &str, origin: &Origin) {
        self.setup.notes.push(origin.note(why));
    }

    fn items(&mut self, mut items: &[Item]) {
        if self.depth == DEEPEST {
            let origin = Origin { place: Some((self.file.to_owned(), first_line(items))), command: String::new() };
            return self.note("what follows is nested too deeply to be read", &origin);
        }
        self.depth += 1;
        while let Some((item, rest)) = items.split_first() {
            items = rest;
            match item {
                Item::Keyword(keyword) => self.keyword(keyword, rest),
                Item::Command(command) => {
                    if command.before == Operator::CaseEnd {
                        self.forget_block();
                    }
                    let first = command.words.first().map_or("", |word| word.raw.as_str());
                    if command.after == Operator::Function {
                        let (body, after) = block(rest, "{", "}");
                        if let Some(name) = command.words.last() {
                            self.functions.insert(name.raw.clone(), body.into());
                        }
                        items = after;
                    } else if first == "function" && matches!(rest.first(), Some(Item::Keyword("{"))) {
                        let (body, after) = block(rest, "{", "}");
                        if let Some(name) = command.words.get(1) {
                            self.functions.insert(name.raw.clone(), body.into());
                        }
                        items = after;
                    } else if matches!(first, "for" | "select") {
                        let (body, after) = block(rest, "do", "done");
                        self.repeat(command, body);
                        items = after;
                    } else if first == "case" {
                        self.blocks.push(Vec::new());
                    } else {
                        let next = match rest.first() {
                            Some(Item::Command(next)) if command.after == Operator::Pipe => Some(next),
                            _ => None,
                        };
                        self.command(command, next);
                    }
                }
            }
        }
        self.depth -= 1;
    }

    fn keyword(&mut self, keyword: &str, rest: &[Item]) {
        match keyword {
            "if" | "{" => self.blocks.push(Vec::new()),
            "while" | "until" => {
                self.blocks.push(Vec::new());
                // What the loop assigns has another value the second time.
                let (body, _) = block(rest, "do", "done");
                for item in body {
                    if let Item::Command(Command { words, .. }) = item
                        && let Some((name, _)) = words.first().and_then(assigned)
                    {
                        self.assign(&name, None);
                    }
                }
            }
            "else" | "elif" => self.forget_block(),
            "fi" | "done" | "esac" | "}" => self.end_block(),
            _ => {}
        }
    }

    /// Whether the block ran is not known: neither are the variables that it assigns.
    fn forget_block(&mut self) {
        for name in self.blocks.last().into_iter().flatten() {
            self.variables.insert(name.clone(), None);
        }
    }

    fn end_block(&mut self) {
        self.forget_block();
        let names = self.blocks.pop().unwrap_or_default();
        if let Some(outer) = self.blocks.last_mut() {
            outer.extend(names);
        }
    }

    fn assign(&mut self, name: &str, value: Option<String>) {
        if let Some(block) = self.blocks.last_mut() {
            block.push(name.to_owned());
        }
        self.variables.insert(name.to_owned(), value);
    }

    /// A `for` loop: once for each word, or once with an unknown value if the words are not known.
    fn repeat(&mut self, command: &Command, body: &[Item]) {
        // `for ((…))` has no name.
        let Some((name, words)) = command.words.get(1).zip(command.words.get(2..)) else { return self.items(body) };
        let fields: Vec<Field> = words.iter().skip(1).flat_map(|word| self.fields(word)).collect();
        let listed = words.first().is_some_and(|word| word.raw == "in") && fields.iter().all(|field| !field.is_unknown);
        let values = if listed { fields.into_iter().map(|field| Some(field.text)).collect() } else { vec![None] };
        for value in values {
            self.blocks.push(Vec::new());
            self.assign(&name.raw, value);
            self.items(body);
            self.end_block();
            if self.budget == 0 {
                return;
            }
        }
    }

    /// The value of a variable or an argument.
    fn value(&self, name: &str) -> Option<String> {
        match name.parse::<usize>() {
            Ok(0) => None,
            Ok(number) => self.arguments.as_ref()?.get(number - 1).cloned().unwrap_or_else(|| Some(String::new())),
            Err(_) => self.variables.get(name).cloned().flatten(),
        }
    }

    /// A word after expansion and field splitting; as it is written if a value is not known.
    fn fields(&self, word: &Word) -> Vec<Field> {
        let mut fields: Vec<Field> = Vec::new();
        let mut current: Option<Field> = None;
        let append = |current: &mut Option<Field>, text: &str, is_unknown| {
            let field = current.get_or_insert_with(|| Field { text: String::new(), is_unknown: false });
            field.text.push_str(text);
            field.is_unknown |= is_unknown;
        };
        for part in &word.parts {
            match part {
                Part::Text { text, .. } => append(&mut current, text, false),
                Part::Unknown(raw) => append(&mut current, raw, true),
                Part::Variable { name, quoted } if matches!(name.as_str(), "@" | "*") => match &self.arguments {
                    None => append(&mut current, &format!("${name}"), true),
                    Some(arguments) => {
                        for (index, argument) in arguments.iter().enumerate() {
                            if index > 0 && (name == "@" || !quoted) {
                                fields.extend(current.take());
                            } else if index > 0 {
                                append(&mut current, " ", false);
                            }
                            let text = argument.as_deref().unwrap_or("$@");
                            append(&mut current, text, argument.is_none());
                        }
                    }
                },
                Part::Variable { name, quoted } => match self.value(name) {
                    None => append(&mut current, &format!("${name}"), true),
                    Some(value) if *quoted => append(&mut current, &value, false),
                    Some(value) => {
                        if value.starts_with(char::is_whitespace) {
                            fields.extend(current.take());
                        }
                        for (index, text) in value.split_whitespace().enumerate() {
                            if index > 0 {
                                fields.extend(current.take());
                            }
                            append(&mut current, text, false);
                        }
                        if value.ends_with(char::is_whitespace) {
                            fields.extend(current.take());
                        }
                    }
                },
            }
        }
        fields.extend(current);
        fields
    }

    /// A text after expansion, in one piece.
    fn joined(&self, parts: &[Part]) -> Field {
        let quoted = parts.iter().cloned().map(|part| match part {
            Part::Variable { name, .. } => Part::Variable { name, quoted: true },
            part => part,
        });
        let fields = self.fields(&Word { raw: String::new(), parts: quoted.collect() });
        let is_unknown = fields.iter().any(|field| field.is_unknown);
        let texts: Vec<String> = fields.into_iter().map(|field| field.text).collect();
        Field { text: texts.join(" "), is_unknown }
    }

    /// Assigns what a word such as `NAME=VALUE` says; false if it is none.
    fn assignment(&mut self, word: &Word, may_not_run: bool) -> bool {
        let Some((name, parts)) = assigned(word) else { return false };
        let value = parts.map(|parts| self.joined(&parts)).filter(|value| !value.is_unknown && !may_not_run);
        self.assign(&name, value.map(|value| value.text));
        true
    }

    /// Arithmetic, and expansions such as `${X:=1}`, may assign variables, which then have no known value.
    fn calculate(&mut self, word: &Word) {
        let raw = word.raw.as_str();
        let steps = [raw.strip_suffix("++"), raw.strip_suffix("--"), raw.strip_prefix("++")];
        let steps = steps.into_iter().flatten().filter(|name| is_name(name));
        let expansions = word.parts.iter().filter_map(|part| match part {
            Part::Unknown(raw) if ["=", "++", "--"].iter().any(|operator| raw.contains(operator)) => Some(raw.as_str()),
            _ => None,
        });
        for name in steps.chain(expansions.flat_map(names_in)).map(str::to_owned).collect::<Vec<_>>() {
            self.assign(&name, None);
        }
    }

    fn command(&mut self, command: &Command, next: Option<&Command>) {
        if self.budget == 0 {
            return;
        }
        self.budget -= 1;
        let may_not_run = command.before == Operator::Chain;
        let assignments = command.words.iter().take_while(|word| assigned(word).is_some()).count();
        let (assignments, words) = command.words.split_at(assignments);
        if words.is_empty() {
            assignments.iter().for_each(|word| {
                self.assignment(word, may_not_run);
            });
        }
        let fields: Vec<Field> = words.iter().flat_map(|word| self.fields(word)).collect();
        if self.budget == 0 {
            let origin = self.origin(command.line, &fields);
            return self.note("the script has too many commands: it is not read from here on", &origin);
        }
        command.words.iter().for_each(|word| self.calculate(word));
        match words.first().map_or("", |word| word.raw.as_str()) {
            "export" | "readonly" | "local" | "declare" | "typeset" => {
                for word in words {
                    self.assignment(word, may_not_run);
                }
            }
            "unset" | "read" | "let" | "mapfile" | "readarray" => {
                words.iter().flat_map(|word| names_in(&word.raw)).for_each(|name| self.assign(name, None));
            }
            "shift" | "set" | "getopts" => self.arguments = None,
            // It may assign any variable.
            "." | "source" => {
                let names: Vec<String> = self.variables.keys().cloned().collect();
                names.iter().for_each(|name| self.assign(name, None));
            }
            _ => self.execute(&fields, command, next),
        }
    }

    /// Runs a command after expansion.
    fn execute(&mut self, words: &[Field], command: &Command, next: Option<&Command>) {
        let words = unwrapped(words);
        let Some((first, arguments)) = words.split_first() else { return };
        let origin = self.origin(command.line, words);
        let unknown = words.iter().find(|word| word.is_unknown);
        let name = first.text.rsplit('/').next().unwrap_or_default();
        let texts: Vec<String> = arguments.iter().map(|word| word.text.clone()).collect();
        let mentions = mentions(words);
        match name {
            _ if first.is_unknown => {}
            "echo" | "printf" => {
                let text = printed(name, &texts);
                return self.output(&text, unknown, command, next, &origin);
            }
            "cat" | "tee" => {
                for redirect in &command.redirects {
                    if let Redirect::Here { text, .. } = redirect {
                        let text = self.joined(&text.parts);
                        self.output(&text.text, Some(&text).filter(|text| text.is_unknown), command, next, &origin);
                    }
                }
                return;
            }
            "eval" if unknown.is_none() => return self.items(&lex(&texts.join(" "), command.line)),
            _ if SHELLS.contains(&name) => {
                let option = texts
                    .iter()
                    .position(|word| word.starts_with('-') && !word.starts_with("--") && word.ends_with('c'));
                if let Some(script) = option.and_then(|option| arguments.get(option + 1)) {
                    return self.nested(script, command.line, &origin);
                }
                for redirect in &command.redirects {
                    if let Redirect::Here { text, line } = redirect {
                        let text = self.joined(&text.parts);
                        self.nested(&text, *line, &origin);
                    }
                }
                return;
            }
            "ip" if unknown.is_none() => return self.ip(&texts, command, &origin),
            _ if PRINTING.contains(&name) => return,
            _ => {
                if let Some(body) = self.functions.get(name).cloned() {
                    self.called.insert(name.to_owned());
                    let values = arguments.iter().map(|word| (!word.is_unknown).then(|| word.text.clone()));
                    let outer = self.arguments.replace(values.collect());
                    self.items(&body);
                    self.arguments = outer;
                    return;
                }
            }
        }
        if mentions {
            let why = match unknown {
                Some(word) => format!("`{}` has no known value", word.text),
                None => format!("what `{name}` does with it is not known"),
            };
            self.note(&why, &origin);
        }
    }

    /// A script in a script, which has variables of its own.
    fn nested(&mut self, script: &Field, line: usize, origin: &Origin) {
        if script.is_unknown && mentions(std::slice::from_ref(script)) {
            return self.note("a value in it is not known", origin);
        }
        if self.depth == DEEPEST {
            return self.note("it is nested too deeply to be read", origin);
        }
        let mut inner = Script::new(self.setup, self.file, self.read);
        (inner.depth, inner.budget) = (self.depth + 1, self.budget);
        if !self.blocks.is_empty() {
            inner.blocks.push(Vec::new());
        }
        inner.run(&script.text, line);
        self.budget = inner.budget;
    }

    /// What a command prints: entries of `rt_tables`, input of another command, a file, or text for a person.
    fn output(
        &mut self,
        text: &str,
        unknown: Option<&Field>,
        command: &Command,
        next: Option<&Command>,
        origin: &Origin,
    ) {
        let reader: Vec<Field> = next.iter().flat_map(|next| &next.words).flat_map(|word| self.fields(word)).collect();
        let reader = unwrapped(&reader);
        let program = reader.first().map_or("", |word| word.text.rsplit('/').next().unwrap_or_default());
        let redirects = command.redirects.iter().chain(next.iter().flat_map(|next| &next.redirects));
        let mut files: Vec<&str> = redirects.filter_map(Redirect::written).collect();
        if program == "tee" {
            files.extend(reader.iter().skip(1).map(|word| word.text.as_str()));
        }
        if command.words.iter().any(|word| word.raw == "tee") {
            files.extend(command.words.iter().map(|word| word.raw.as_str()));
        }
        let mentions = mentioned([text].into_iter());
        let unknown = unknown.map(|word| format!("`{}` has no known value", word.text));
        if files.iter().any(|file| file.contains("rt_tables")) {
            match unknown {
                Some(why) => self.note(&why, origin),
                None => self.setup.names.extend(names(text)),
            }
        } else if SHELLS.contains(&program) {
            self.nested(&Field { text: text.to_owned(), is_unknown: unknown.is_some() }, command.line, origin);
        } else if program == "ip" {
            self.is_input_read = true;
            let words: Vec<String> = reader.iter().skip(1).map(|word| word.text.clone()).collect();
            match (request(&words, None), unknown) {
                (_, Some(why)) => self.note(&why, origin),
                (Ok(Request::Batch { file: "-", family }), None) => self.batch(text, command.line, family),
                _ if mentions => self.note("what `ip` does with it is not known", origin),
                _ => {}
            }
        } else if let Some(file) = files.first().filter(|_| mentions) {
            self.note(&format!("it is written to {file}, not run: import that file, too"), origin);
        }
    }

    /// An `ip` command, without its first word.
    fn ip(&mut self, words: &[String], command: &Command, origin: &Origin) {
        let unconditional = self.blocks.is_empty() && command.before != Operator::Chain;
        match request(words, None) {
            Ok(Request::Batch { file, family }) => {
                let (here, input) = command.redirects.iter().fold((None, None), |found, redirect| match redirect {
                    Redirect::Here { text, line } => (Some((text, *line)), found.1),
                    Redirect::Input(file) => (found.0, Some(file.raw.clone())),
                    Redirect::Output(_) => found,
                });
                let file = if file == "-" { input.unwrap_or_else(|| file.to_owned()) } else { file.to_owned() };
                if let (Some((text, line)), "-") = (here, file.as_str()) {
                    let text = self.joined(&text.parts);
                    if text.is_unknown {
                        return self.note("a value in its input is not known", origin);
                    }
                    self.batch(&text.text, line, family);
                } else if file == "-" {
                    if !(command.before == Operator::Pipe && std::mem::take(&mut self.is_input_read)) {
                        self.note("its input is not known", origin);
                    }
                } else if let Some(text) = (self.read)(&file) {
                    let mut inner = Script::new(self.setup, &file, self.read);
                    inner.batch(&text, 1, family);
                } else {
                    self.note(&format!("{file} cannot be read"), origin);
                }
            }
            Ok(request) => {
                if let Err(why) = self.setup.apply(&request, unconditional, origin) {
                    self.note(&why, origin);
                } else if request == Request::Other && mentioned(words.iter().map(String::as_str)) {
                    self.note("it is for another network namespace, or the command in it is not known", origin);
                }
            }
            Err(why) => {
                let is_batch = words.iter().any(|word| word.starts_with("-b"));
                if is_batch || mentioned(words.iter().map(String::as_str)) {
                    self.note(&why, origin);
                }
            }
        }
    }

    /// A file for `ip -batch`: a command without `ip` on each line.
    pub(super) fn batch(&mut self, text: &str, line: usize, family: Option<Family>) {
        for (number, words) in batch_lines(text, line) {
            let command = format!("ip {}", words.join(" "));
            let origin = Origin { place: Some((self.file.to_owned(), number)), command };
            let applied =
                request(&words, family).and_then(|request| self.setup.apply(&request, self.blocks.is_empty(), &origin));
            if let Err(why) = applied {
                self.note(&why, &origin);
            }
        }
    }
}

/// The lines of a batch file, by their numbers, as `makeargs()` in `lib/utils.c` of iproute2 splits them.
pub(super) fn batch_lines(text: &str, first: usize) -> Vec<(usize, Vec<String>)> {
    let mut lines = text.lines().zip(first..);
    let mut commands = Vec::new();
    while let Some((line, number)) = lines.next() {
        let mut command = line.split('#').next().unwrap_or_default().to_owned();
        while command.ends_with('\\') {
            command.pop();
            let Some((line, _)) = lines.next() else { break };
            command += line.split('#').next().unwrap_or_default();
        }
        let mut words = Vec::new();
        let mut rest = command.trim();
        while !rest.is_empty() {
            let (word, after) = match rest.chars().next() {
                Some(quote @ ('"' | '\'')) => rest[1..].split_once(quote).unwrap_or((&rest[1..], "")),
                _ => rest.split_once(char::is_whitespace).unwrap_or((rest, "")),
            };
            words.push(word.to_owned());
            rest = after.trim();
        }
        if !words.is_empty() {
            commands.push((number, words));
        }
    }
    commands
}

fn first_line(items: &[Item]) -> usize {
    let lines = items.iter().filter_map(|item| match item {
        Item::Command(command) => Some(command.line),
        Item::Keyword(_) => None,
    });
    lines.min().unwrap_or_default()
}

/// The items of a block that begins here, and those after it. Without a beginning it is one item; without an end, all.
fn block<'i>(items: &'i [Item], open: &str, close: &str) -> (&'i [Item], &'i [Item]) {
    let mut depth = 0;
    let mut start = 0;
    for (index, item) in items.iter().enumerate() {
        match item {
            Item::Keyword(keyword) if *keyword == open => {
                if depth == 0 {
                    start = index + 1;
                }
                depth += 1;
            }
            Item::Keyword(keyword) if *keyword == close && depth > 0 => {
                depth -= 1;
                if depth == 0 {
                    return (&items[start..index], &items[index + 1..]);
                }
            }
            _ if depth == 0 && open == "{" => return items.split_at(1),
            _ => {}
        }
    }
    (items, &[])
}

/// The name that a word such as `NAME=VALUE` assigns, and the parts of the value; none for the parts if it is added to
/// what is there.
fn assigned(word: &Word) -> Option<(String, Option<Vec<Part>>)> {
    let (Part::Text { text, quoted: false }, rest) = word.parts.split_first()? else { return None };
    let (name, value) = text.split_once('=')?;
    if let Some(name) = name.strip_suffix('+').filter(|name| is_name(name)) {
        return Some((name.to_owned(), None));
    }
    let first = Part::Text { text: value.to_owned(), quoted: false };
    is_name(name).then(|| (name.to_owned(), Some([first].into_iter().chain(rest.iter().cloned()).collect())))
}

/// What may be names of variables in a text.
fn names_in(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').filter(|name| is_name(name))
}

/// The command that is run in the end, of one such as `sudo -u root env A=b ip …`.
fn unwrapped(mut words: &[Field]) -> &[Field] {
    while let Some((first, rest)) = words.split_first() {
        let name = first.text.rsplit('/').next().unwrap_or_default();
        let Some((_, valued, between)) = WRAPPERS.iter().find(|(wrapper, ..)| *wrapper == name) else { break };
        words = rest;
        while let Some((option, rest)) = words.split_first() {
            let is_assignment = option.text.split_once('=').is_some_and(|(name, _)| is_name(name));
            if !option.text.starts_with('-') && !is_assignment {
                break;
            }
            let values = usize::from(valued.contains(&option.text.as_str()));
            words = rest.get(values..).unwrap_or_default();
        }
        words = words.get(*between..).unwrap_or_default();
    }
    words
}

/// What `echo` or `printf` prints.
fn printed(name: &str, words: &[String]) -> String {
    let text = if name == "printf" {
        let mut words = words.iter();
        let mut text = words.next().cloned().unwrap_or_default();
        for word in words {
            let at = text.find("%s").into_iter().chain(text.find("%d")).min();
            if let Some(at) = at {
                text.replace_range(at..at + 2, word);
            }
        }
        text
    } else {
        let options =
            words.iter().take_while(|word| matches!(word.as_str(), "-e" | "-n" | "-en" | "-ne" | "-E")).count();
        words[options..].join(" ")
    };
    text.replace("\\t", "\t").replace("\\n", "\n")
}

/// Whether a command, or the text in one of its words, seems to make a rule or a route.
fn mentions(words: &[Field]) -> bool {
    mentioned(words.iter().map(|word| word.text.as_str()))
}

fn mentioned<'w>(words: impl Iterator<Item = &'w str>) -> bool {
    let trimmed = |word: &'w str| word.trim_matches(['"', '\'', ';', '(', ')', '`']);
    let words: Vec<&str> = words.flat_map(str::split_whitespace).map(trimmed).collect();
    let is_verb = |word: &str| {
        word.starts_with('$')
            || word.len() > 1
                && ["add", "append", "prepend", "replace", "change", "chg"].iter().any(|verb| verb.starts_with(word))
            || word == "a"
    };
    let is_object = |word: &str| word.len() > 1 && ["rule", "route"].iter().any(|object| object.starts_with(word));
    let is_ip = |word: &str| word.rsplit('/').next() == Some("ip");
    words.windows(2).any(|pair| is_object(pair[0]) && is_verb(pair[1]))
        || words.iter().enumerate().filter(|(_, word)| is_ip(word)).any(|(at, _)| {
            let rest = words[at + 1..].iter().skip_while(|word| word.starts_with('-'));
            let pair: Vec<&&str> = rest.take(2).collect();
            matches!(pair.as_slice(), [object, verb] if (matches!(**object, "r" | "ru" | "ro") || object.starts_with('$')) && is_verb(verb))
        })
}
