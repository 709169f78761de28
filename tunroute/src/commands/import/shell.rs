//! The lexer for shell scripts: commands, quoting, expansions and here-documents (POSIX.1-2024, "Shell Command Language",
//! sections 2.2 to 2.7).
//!
//! It is written here because no crate fits. `shlex` has words only, no operators or variables. `yash-syntax` is under the
//! GPL. `conch-parser` has had no release since 2019. `brush-parser` brings 22 more crates and refuses a whole script at its
//! first error; an import has to go on with the next command, and to name the line.

/// A part of a script.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Item {
    /// A reserved word that begins or ends a block.
    Keyword(&'static str),
    /// A simple command, or the head of a function, a `for` loop or a `case`.
    Command(Command),
}

/// A simple command.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Command {
    /// The line of its first word, from 1 on.
    pub(super) line: usize,
    /// The name, assignments before it, and arguments.
    pub(super) words: Vec<Word>,
    /// Where its input comes from and its output goes to.
    pub(super) redirects: Vec<Redirect>,
    /// The operator before it.
    pub(super) before: Operator,
    /// The operator after it.
    pub(super) after: Operator,
}

/// What stands between two commands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Operator {
    /// A new line, `;`, `&` or a parenthesis.
    #[default]
    Separator,
    /// `&&` or `||`: the next command runs or not.
    Chain,
    /// `|`
    Pipe,
    /// `;;`: the end of a branch of `case`.
    CaseEnd,
    /// `()`: the command before it is the name of a function.
    Function,
}

/// A word before expansion.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Word {
    /// As it is written.
    pub(super) raw: String,
    /// Its parts, in order.
    pub(super) parts: Vec<Part>,
}

/// A part of a word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// Literal text.
    Text {
        /// Without the quotes.
        text: String,
        /// Whether quotes or a backslash were around it.
        quoted: bool,
    },
    /// `$NAME` or `${NAME}`.
    Variable {
        /// The name: of a variable, or `1`, `@`, `*`.
        name: String,
        /// Whether double quotes are around it.
        quoted: bool,
    },
    /// Any other expansion: its value is known only while the script runs.
    Unknown(String),
}

/// A redirection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Redirect {
    /// `< FILE`
    Input(Word),
    /// `> FILE` or `>> FILE`
    Output(Word),
    /// `<< WORD` with the lines up to that word, or `<<< TEXT`.
    Here {
        /// The text.
        text: Word,
        /// The line on which it begins.
        line: usize,
    },
}

impl Redirect {
    /// The file that output goes to; none for a device or a descriptor.
    pub(super) fn written(&self) -> Option<&str> {
        let Self::Output(file) = self else { return None };
        let raw = file.raw.as_str();
        (!raw.starts_with("/dev/") && !raw.bytes().all(|b| b.is_ascii_digit() || b == b'-')).then_some(raw)
    }
}

/// Words that begin, divide or end a block where a command may begin.
const KEYWORDS: [&str; 13] =
    ["if", "then", "else", "elif", "fi", "do", "done", "esac", "while", "until", "{", "}", "!"];

/// Splits a script into commands. `line` is the number of its first line. Never fails: an unterminated quotation ends with
/// the text.
pub(super) fn lex(text: &str, line: usize) -> Vec<Item> {
    let mut lexer = Lexer { rest: text, line, ..Lexer::default() };
    lexer.script();
    lexer.items
}

/// The parts of a text in which only `$`, backquotes and backslashes are special: a here-document.
pub(super) fn expandable(text: &str) -> Word {
    let mut lexer = Lexer { rest: text, ..Lexer::default() };
    lexer.double_quoted(None);
    lexer.take_word(text)
}

#[derive(Default)]
struct Lexer<'t> {
    rest: &'t str,
    line: usize,
    items: Vec<Item>,
    command: Command,
    /// The parts of the word that is being read.
    parts: Vec<Part>,
    /// The operator before the next command.
    before: Operator,
    /// Here-documents whose lines begin after this line: the item or the current command, its redirection, the
    /// delimiter, and whether tabs are removed.
    pending: Vec<Pending>,
}

struct Pending {
    /// The index of the command in `items`.
    item: usize,
    redirect: usize,
    delimiter: String,
    literal: bool,
    tabs: bool,
}

impl<'t> Lexer<'t> {
    fn peek(&self) -> Option<char> {
        self.rest.chars().next()
    }

    fn next(&mut self) -> Option<char> {
        let c = self.peek()?;
        self.rest = &self.rest[c.len_utf8()..];
        self.line += usize::from(c == '\n');
        Some(c)
    }

    fn eat(&mut self, text: &str) -> bool {
        let found = self.rest.starts_with(text);
        if found {
            (0..text.chars().count()).for_each(|_| {
                self.next();
            });
        }
        found
    }

    fn script(&mut self) {
        while let Some(c) = self.peek() {
            match c {
                ' ' | '\t' | '\r' => {
                    self.next();
                }
                '\\' if self.rest.starts_with("\\\n") || self.rest.starts_with("\\\r\n") => {
                    self.eat("\\");
                    self.eat("\r");
                    self.next();
                }
                '#' => self.skip_line(),
                '\n' => {
                    self.end(Operator::Separator);
                    self.next();
                    self.here_documents();
                }
                ';' | '&' | '|' | '(' | ')' if !self.rest.starts_with("&>") => self.operator(),
                '<' | '>' | '&' => self.redirect(),
                _ => self.argument(),
            }
        }
        self.end(Operator::Separator);
    }

    fn skip_line(&mut self) {
        let end = self.rest.find('\n').unwrap_or(self.rest.len());
        self.rest = &self.rest[end..];
    }

    fn operator(&mut self) {
        const OPERATORS: [(&str, Operator); 12] = [
            (";;&", Operator::CaseEnd),
            (";;", Operator::CaseEnd),
            (";&", Operator::CaseEnd),
            ("&&", Operator::Chain),
            ("||", Operator::Chain),
            ("|&", Operator::Pipe),
            ("|", Operator::Pipe),
            (";", Operator::Separator),
            ("&", Operator::Separator),
            ("()", Operator::Function),
            ("(", Operator::Separator),
            (")", Operator::Separator),
        ];
        for (text, operator) in OPERATORS {
            if self.eat(text) {
                return self.end(operator);
            }
        }
    }

    /// Ends the current command.
    fn end(&mut self, operator: Operator) {
        if self.command.words.is_empty() && self.command.redirects.is_empty() {
            // `a && \n b` and `;; b)`: what stands after the command before counts.
            if operator != Operator::Separator {
                self.before = operator;
            }
            return;
        }
        let command = Command { before: self.before, after: operator, ..std::mem::take(&mut self.command) };
        self.before = operator;
        self.items.push(Item::Command(command));
    }

    fn redirect(&mut self) {
        let here_string = self.eat("<<<");
        let here = !here_string && self.eat("<<");
        let tabs = here && self.eat("-");
        let input = here || here_string || self.rest.starts_with('<');
        while self.peek().is_some_and(|c| matches!(c, '<' | '>' | '&' | '|')) {
            self.next();
        }
        self.blanks();
        if self.command.words.is_empty() {
            self.command.line = self.line;
        }
        let line = self.line;
        let word = self.word();
        let redirect = match (here || here_string, input) {
            (true, _) => Redirect::Here { text: word.clone(), line },
            (false, true) => Redirect::Input(word.clone()),
            (false, false) => Redirect::Output(word.clone()),
        };
        self.command.redirects.push(redirect);
        if here {
            let literal = word.parts.iter().any(|part| matches!(part, Part::Text { quoted: true, .. }));
            let delimiter = word.parts.iter().map(|part| match part {
                Part::Text { text, .. } => text.as_str(),
                Part::Variable { name, .. } => name.as_str(),
                Part::Unknown(raw) => raw.as_str(),
            });
            self.pending.push(Pending {
                item: self.items.len(),
                redirect: self.command.redirects.len() - 1,
                delimiter: delimiter.collect(),
                literal,
                tabs,
            });
        }
    }

    /// Reads the here-documents that were announced on the line before.
    fn here_documents(&mut self) {
        for Pending { item, redirect, delimiter, literal, tabs } in std::mem::take(&mut self.pending) {
            let first = self.line;
            let mut body = String::new();
            while !self.rest.is_empty() {
                let end = self.rest.find('\n').map_or(self.rest.len(), |end| end + 1);
                let (line, rest) = self.rest.split_at(end);
                (self.rest, self.line) = (rest, self.line + 1);
                let line = if tabs { line.trim_start_matches('\t') } else { line };
                if line.trim_end_matches(['\n', '\r']) == delimiter {
                    break;
                }
                body += line;
            }
            let text = if literal {
                Word { raw: body.clone(), parts: vec![Part::Text { text: body, quoted: true }] }
            } else {
                expandable(&body)
            };
            if let Some(Item::Command(command)) = self.items.get_mut(item)
                && let Some(place) = command.redirects.get_mut(redirect)
            {
                *place = Redirect::Here { text, line: first };
            }
        }
    }

    fn blanks(&mut self) {
        while self.eat(" ") || self.eat("\t") || self.eat("\\\n") {}
    }

    fn argument(&mut self) {
        let line = self.line;
        let word = self.word();
        if word.raw.bytes().all(|b| b.is_ascii_digit()) && self.rest.starts_with(['<', '>']) {
            // The number of a file descriptor.
            return;
        }
        let is_function = matches!(self.command.words.as_slice(), [first, _] if first.raw == "function");
        if is_function && word.raw == "{" {
            self.end(Operator::Separator);
        }
        if self.command.words.is_empty() {
            if let Some(keyword) = KEYWORDS.iter().find(|keyword| **keyword == word.raw) {
                self.before = Operator::default();
                return self.items.push(Item::Keyword(keyword));
            }
            self.command.line = line;
        }
        self.command.words.push(word);
    }

    /// A word, up to the next blank or operator.
    fn word(&mut self) -> Word {
        let start = self.rest;
        while let Some(c) = self.peek() {
            match c {
                ' ' | '\t' | '\n' | '\r' | ';' | '&' | '|' | ')' | '<' | '>' => break,
                '(' if self.after_assignment() => {
                    let raw = self.nested('(', ')');
                    self.parts.push(Part::Unknown(raw));
                }
                '(' => break,
                '\'' => {
                    self.next();
                    let end = self.rest.find('\'').unwrap_or(self.rest.len());
                    let text = self.rest[..end].to_owned();
                    self.line += text.matches('\n').count();
                    self.rest = &self.rest[end..];
                    self.next();
                    self.parts.push(Part::Text { text, quoted: true });
                }
                '"' => {
                    self.next();
                    self.parts.push(Part::Text { text: String::new(), quoted: true });
                    self.double_quoted(Some('"'));
                }
                '\\' => {
                    self.next();
                    match self.next() {
                        None | Some('\n') => {}
                        Some(c) => self.push(c, true),
                    }
                }
                '$' | '`' => self.expansion(false),
                c => {
                    self.next();
                    self.push(c, false);
                }
            }
        }
        let raw = &start[..start.len() - self.rest.len()];
        self.take_word(raw)
    }

    fn take_word(&mut self, raw: &str) -> Word {
        Word { raw: raw.to_owned(), parts: std::mem::take(&mut self.parts) }
    }

    /// Is what has been read of the word `NAME=`, so that a parenthesis begins an array?
    fn after_assignment(&self) -> bool {
        matches!(self.parts.as_slice(), [Part::Text { text, quoted: false }] if text.ends_with('='))
    }

    fn push(&mut self, c: char, is_quoted: bool) {
        match self.parts.last_mut() {
            Some(Part::Text { text, quoted }) if *quoted == is_quoted => text.push(c),
            _ => self.parts.push(Part::Text { text: c.to_string(), quoted: is_quoted }),
        }
    }

    /// Reads up to the closing quotation mark, or to the end of the text.
    fn double_quoted(&mut self, end: Option<char>) {
        while let Some(c) = self.peek() {
            match c {
                '$' | '`' => self.expansion(true),
                '\\' => {
                    self.next();
                    match self.peek() {
                        Some('\n') => {
                            self.next();
                        }
                        Some(c) if matches!(c, '$' | '`' | '\\') || Some(c) == end => {
                            self.next();
                            self.push(c, true);
                        }
                        _ => self.push('\\', true),
                    }
                }
                c => {
                    self.next();
                    if Some(c) == end {
                        return;
                    }
                    self.push(c, true);
                }
            }
        }
    }

    /// What begins with `$` or a backquote.
    fn expansion(&mut self, quoted: bool) {
        let start = self.rest;
        if self.eat("`") {
            while let Some(c) = self.next() {
                match c {
                    '\\' => {
                        self.next();
                    }
                    '`' => break,
                    _ => {}
                }
            }
        } else {
            self.next();
            match self.peek() {
                Some('(') => {
                    self.nested('(', ')');
                }
                Some('{') => {
                    let inside = self.nested('{', '}');
                    let name = inside.trim_start_matches('{').trim_end_matches('}');
                    if is_name(name) || is_parameter(name) {
                        return self.parts.push(Part::Variable { name: name.to_owned(), quoted });
                    }
                }
                // `$'…'`: escapes that are not read here.
                Some('\'') if !quoted => {
                    self.next();
                    while let Some(c) = self.next() {
                        match c {
                            '\\' => {
                                self.next();
                            }
                            '\'' => break,
                            _ => {}
                        }
                    }
                }
                // `$"…"`: a translated text.
                Some('"') if !quoted => return,
                Some(c) if c.is_ascii_alphabetic() || c == '_' => {
                    let end = self.rest.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
                    let (name, rest) = self.rest.split_at(end.unwrap_or(self.rest.len()));
                    self.rest = rest;
                    return self.parts.push(Part::Variable { name: name.to_owned(), quoted });
                }
                Some(c) if c.is_ascii_digit() || matches!(c, '@' | '*' | '#' | '?' | '$' | '!' | '-') => {
                    self.next();
                    return self.parts.push(Part::Variable { name: c.to_string(), quoted });
                }
                _ => return self.push('$', quoted),
            }
        }
        let raw = &start[..start.len() - self.rest.len()];
        self.parts.push(Part::Unknown(raw.to_owned()));
    }

    /// Passes over a bracket and what is inside it, and returns both.
    fn nested(&mut self, open: char, close: char) -> String {
        let start = self.rest;
        let mut depth = 0;
        while let Some(c) = self.next() {
            match c {
                '\\' => {
                    self.next();
                }
                '\'' | '"' => while self.next().is_some_and(|inner| inner != c) {},
                c if c == open => depth += 1,
                c if c == close => {
                    depth -= 1;
                    if depth == 0 {
                        break;
                    }
                }
                _ => {}
            }
        }
        start[..start.len() - self.rest.len()].to_owned()
    }
}

/// Can it be the name of a variable?
pub(super) fn is_name(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
}

/// Is it the number of an argument, or all of them?
fn is_parameter(text: &str) -> bool {
    matches!(text, "@" | "*") || (!text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()))
}
