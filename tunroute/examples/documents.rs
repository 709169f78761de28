//! Generates documents from the definitions of the command line and of the configuration into a directory: manual pages,
//! shell completions, JSON Schemas, and `docs/configuration.md`. `cargo xtask dist` and `cargo xtask lint` run it; the
//! daemon's binary carries none of it.

use std::{
    env, fs,
    io::{self, Write as _},
    path::Path,
};

use anyhow::{Context as _, Result};
use clap::{Command, CommandFactory as _};
use clap_complete::Shell;
use clap_mangen::Man;
use roff::{Inline, Roff, bold, italic, roman};
use tunroute::{
    commands::cli::Cli,
    config::{
        keys::{Key, Kind, Required, TOP},
        schema,
    },
    control::status,
};

const MANUAL: &str = "Source-based policy routing";
const EXAMPLE: &str = r#"[interfaces]
ingress = ["lan0"]
uplink  = ["net0"]

[tunnel.sixxs0]
table = 200

[[policy]]
name = "tunnel0"
from = ["2a02::1", "2a02:578:85a0::/48"]
via  = ["sixxs0"]"#;
const FILES: &[(&str, &str)] = &[
    ("/etc/tunroute/tunroute.toml", "The configuration, see tunroute.toml(5)."),
    ("/var/lib/tunroute", "What must outlive the daemon: allocated tables, start histories."),
    ("/run/tunroute", "The control socket, and a record of what the daemon has made."),
    ("/sys/fs/bpf/tunroute", "Pinned maps and programs."),
    ("/etc/iproute2/rt_tables.d/tunroute.conf", "The names of the routing tables, for ip(8)."),
];
const STATUSES: &[(&str, &str)] = &[
    ("0", "Done. For plan: nothing to do. For explain and verify: the datapaths agree."),
    ("1", "Failed. For explain and verify: the datapaths differ."),
    (
        "2",
        "Wrong usage. For plan and doctor: there is something to do. For explain and verify: they could not be asked.",
    ),
    ("77", "Not permitted: CAP_NET_ADMIN is missing."),
];

fn main() -> Result<()> {
    let directory = env::args_os().nth(1).context("name a directory to write to")?;
    let directory = Path::new(&directory);
    fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;

    let mut command = Cli::command().disable_help_subcommand(true).subcommand_help_heading("COMMANDS");
    command.build();
    for page in command.get_subcommands().filter(|command| !command.is_hide_set()).chain([&command]) {
        let man = Man::new(page.clone()).section("8").source(version()).manual(MANUAL);
        write(directory, &man.get_filename(), &command_page(&man, page)?)?;
    }
    write(directory, "tunroute.toml.5", configuration_page().to_roff().as_bytes())?;
    write(directory, "configuration.md", reference().as_bytes())?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, &mut Cli::command(), "tunroute", directory)
            .with_context(|| format!("cannot write the completions for {shell}"))?;
    }
    write(directory, "tunroute.schema.json", format!("{:#}\n", schema()).as_bytes())?;
    write(directory, "status.schema.json", format!("{:#}\n", status::schema()).as_bytes())
}

fn write(directory: &Path, name: &str, content: &[u8]) -> Result<()> {
    let path = directory.join(name);
    fs::write(&path, content).with_context(|| format!("cannot write {}", path.display()))
}

fn version() -> String {
    format!("tunroute {}", env!("CARGO_PKG_VERSION"))
}

/// `tunroute(8)`, or the page of one of its commands.
fn command_page(man: &Man, command: &Command) -> io::Result<Vec<u8>> {
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    let mut rest = Roff::new();
    if let Some(example) = command.get_after_help() {
        let example = example.to_string();
        rest.control("SH", ["EXAMPLE"]);
        rest.control("nf", []);
        rest.text([roman(example.trim_start_matches("Example: "))]);
        rest.control("fi", []);
    }
    if command.has_subcommands() {
        man.render_subcommands_section(&mut page)?;
        list(&mut rest, "EXIT STATUS", STATUSES);
        list(&mut rest, "FILES", FILES);
        see_also(&mut rest, "tunroute.toml(5), ip-rule(8), ip-route(8), tc-bpf(8)");
    } else {
        see_also(&mut rest, "tunroute(8), tunroute.toml(5)");
    }
    page.write_all(rest.to_roff().as_bytes())?;
    Ok(page)
}

fn list(page: &mut Roff, title: &str, items: &[(&str, &str)]) {
    page.control("SH", [title]);
    for (item, meaning) in items {
        page.control("TP", []).text([bold(*item)]).text([roman(*meaning)]);
    }
}

fn see_also(page: &mut Roff, pages: &str) {
    page.control("SH", ["SEE ALSO"]).text([roman(pages)]);
}

/// `tunroute.toml(5)`
fn configuration_page() -> Roff {
    let mut page = Roff::new();
    page.control("TH", ["tunroute.toml", "5", "", &version(), MANUAL]);
    page.control("SH", ["NAME"]).text([roman("tunroute.toml - which sources leave by which tunnel")]);
    page.control("SH", ["SYNOPSIS"]).text([bold("/etc/tunroute/tunroute.toml")]);
    page.control("SH", ["DESCRIPTION"]);
    page.text([roman(
        "The file is TOML (https://toml.io), in UTF-8. A key that is not listed here is an error. tunroute check says \
         whether a file is right, and if not, what is wrong and what to write instead. A JSON Schema for editors is in \
         /usr/share/tunroute/tunroute.schema.json; the editor is told by the first line of the file:",
    )]);
    verbatim(&mut page, "#:schema /usr/share/tunroute/tunroute.schema.json");
    section(&mut page, "TOP LEVEL", TOP);
    page.control("SH", ["EXAMPLE"]);
    verbatim(&mut page, EXAMPLE);
    page.control("SH", ["FILES"]);
    page.text([roman("/usr/share/doc/tunroute/examples/tunroute.toml is an example of every key.")]);
    see_also(&mut page, "tunroute(8)");
    page
}

fn verbatim(page: &mut Roff, text: &str) {
    page.control("PP", []).control("RS", ["4"]).control("nf", []);
    page.text(text.lines().map(|line| roman(format!("{line}\n"))).collect::<Vec<_>>());
    page.control("fi", []).control("RE", []);
}

/// The keys of a table, and then the tables in it.
fn section(page: &mut Roff, title: &str, keys: &[Key]) {
    page.control("SH", [title]);
    for key in keys {
        page.control("TP", []).text(heading(key)).text([roman(key.doc)]);
        if let Kind::Choice(words) = key.kind {
            page.control("RS", []);
            for (word, meaning) in words {
                page.control("TP", []).text([bold(format!("\"{word}\""))]).text([roman(format!("{meaning}."))]);
            }
            page.control("RE", []);
        }
        match key.required {
            Required::Yes => drop(page.control("IP", []).text([roman("Required.")])),
            Required::Unless(other) => {
                page.control("IP", []).text([roman("Required, unless there is "), bold(other), roman(".")]);
            }
            Required::No => {}
        }
        if let Some(default) = key.default {
            page.control("IP", []).text([roman("Default: "), bold(default), roman(".")]);
        }
    }
    for key in keys {
        if let Some((header, inner)) = inner(key) {
            section(page, &header, inner);
        }
    }
}

/// `docs/configuration.md`
fn reference() -> String {
    let mut page = format!(
        "# Configuration\n\nGenerated from `tunroute/src/config/keys.rs`, as are the manual page `tunroute.toml`(5) and the JSON \
         Schema; `cargo xtask lint --fix` writes it anew.\n\nThe file is TOML, in UTF-8: `/etc/tunroute/tunroute.toml`. An \
         unknown key is an error. `tunroute check` names each mistake and says what to write instead. \
         [An example of every key](../tunroute/examples/tunroute.toml) has comments.\n\n```toml\n{EXAMPLE}\n```\n"
    );
    reference_section(&mut page, "Top level", TOP);
    page
}

/// A table's keys, and then the tables in it.
fn reference_section(page: &mut String, title: &str, keys: &[Key]) {
    *page += &format!("\n## {title}\n");
    for key in keys {
        let heading: String = heading(key).iter().map(plain).collect();
        *page += &format!("\n### `{heading}`\n\n{}\n", key.doc);
        if let Kind::Choice(words) = key.kind {
            page.push('\n');
            words.iter().for_each(|(word, meaning)| *page += &format!("- `\"{word}\"`: {meaning}.\n"));
        }
        let mut facts = Vec::new();
        match key.required {
            Required::Yes => facts.push("Required.".to_owned()),
            Required::Unless(other) => facts.push(format!("Required, unless there is `{other}`.")),
            Required::No => {}
        }
        facts.extend(key.default.map(|default| format!("Default: `{default}`.")));
        if inner(key).is_none() {
            facts.push(format!("Example: `{}`", key.example));
        }
        if !facts.is_empty() {
            *page += &format!("\n{}\n", facts.join(" "));
        }
    }
    for (header, inner) in keys.iter().filter_map(inner) {
        reference_section(page, &format!("`{header}`"), inner);
    }
}

/// A piece of a heading without its typeface.
fn plain(piece: &Inline) -> String {
    match piece {
        Inline::Roman(text) | Inline::Bold(text) | Inline::Italic(text) => text.clone(),
        Inline::LineBreak => "\n".to_owned(),
    }
}

/// How a table in a table is headed, and its keys.
fn inner(key: &Key) -> Option<(String, &'static [Key])> {
    let name = key.name;
    match key.kind {
        // What is written in one line stands after its name.
        Kind::Table(keys) if key.example.starts_with('[') => Some((format!("[{name}]"), keys)),
        Kind::Table(keys) | Kind::OneOrMore(keys) => Some((format!("{name} = {{ ... }}"), keys)),
        Kind::Tables(keys) => Some((format!("[[{name}]]"), keys)),
        Kind::Named(_, keys) => Some((format!("[{name}.NAME]"), keys)),
        _ => None,
    }
}

fn heading(key: &Key) -> Vec<Inline> {
    let (name, assigned) = match (key.kind, inner(key)) {
        (_, Some((header, _))) => return vec![bold(header)],
        (Kind::Flag, _) => (key.name, "true or false".to_owned()),
        (Kind::Number(..), _) => (key.name, "number".to_owned()),
        (Kind::WordOrNumber(word, ..), _) => (key.name, format!("\"{word}\" or number")),
        (Kind::Duration, _) => (key.name, "\"number and unit\", as in \"500ms\", \"60s\", \"5m\"".to_owned()),
        (Kind::Choice(_), _) => (key.name, "one of these words".to_owned()),
        (Kind::Text(form), _) => (key.name, form.to_owned()),
        (Kind::Texts(form), _) => (key.name, format!("{form}; or a list of them")),
        (Kind::Command, _) => (key.name, "[\"program\", \"argument\", ...]".to_owned()),
        (Kind::Table(_) | Kind::OneOrMore(_) | Kind::Tables(_) | Kind::Named(..), None) => (key.name, String::new()),
    };
    vec![bold(name), roman(" = "), italic(assigned)]
}
