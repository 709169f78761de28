//! The table of keys, the parser and the JSON Schema say the same. (`take` asks the schema about every file that the
//! other tests have the parser take.)

use serde_json::Value;

use super::{only_error, refuse, take, take_file, valid};
use crate::config::keys::{INTERFACES, Key, Kind, POLICY, PROBE, START_LIMIT, TOP, TUNNEL};

/// A policy and its tunnel, less the keys that a test gives itself.
fn world(without: &str) -> (String, String) {
    let lines = [("name", "name = \"p\""), ("from", "from = \"2a02::1\""), ("via", "via = [\"sixxs0\", \"wg0\"]")];
    let lines: Vec<&str> = lines.iter().filter(|(key, _)| *key != without).map(|(_, line)| *line).collect();
    ("[tunnel.wg0]\n[tunnel.sixxs0]\n".to_owned(), format!("[[policy]]\n{}\n", lines.join("\n")))
}

/// A file that has this line in a table with these keys.
fn file(keys: &[Key], key: &Key, line: &str) -> String {
    let (tunnel, policy) = world(if keys.as_ptr() == POLICY.as_ptr() { key.name } else { "" });
    let in_braces = |keys: &str, first: &str| format!("{tunnel}{keys} = {{ {first}{line} }}\n{policy}");
    match keys {
        _ if keys.as_ptr() == TOP.as_ptr() => format!("{line}\n{tunnel}{policy}"),
        _ if keys.as_ptr() == INTERFACES.as_ptr() => format!("[interfaces]\n{line}\n{tunnel}{policy}"),
        _ if keys.as_ptr() == TUNNEL.as_ptr() => format!("{tunnel}{line}\n{policy}"),
        _ if keys.as_ptr() == START_LIMIT.as_ptr() => in_braces("start-limit", ""),
        _ if keys.as_ptr() == PROBE.as_ptr() => {
            in_braces("probe", if key.name == "target" { "" } else { "target = \"2001:db8::1\", " })
        }
        _ => format!("{tunnel}{policy}{line}\n"),
    }
}

/// All keys with the tables that they stand in.
fn all() -> Vec<(&'static [Key], &'static Key)> {
    fn below(keys: &'static [Key], found: &mut Vec<(&'static [Key], &'static Key)>) {
        for key in keys {
            found.push((keys, key));
            if let Kind::Table(inner) | Kind::OneOrMore(inner) | Kind::Tables(inner) | Kind::Named(_, inner) = key.kind
            {
                below(inner, found);
            }
        }
    }
    let mut found = Vec::new();
    below(TOP, &mut found);
    found
}

#[test]
fn the_parser_reads_every_key_of_the_table() {
    for (keys, key) in all().into_iter().filter(|(_, key)| !matches!(key.name, "tunnel" | "policy")) {
        let text = file(keys, key, &format!("{} = 1979-05-27", key.name));
        let error = refuse(&text);
        assert_eq!(only_error(&error).underlined().collect::<Vec<_>>(), ["1979-05-27"], "{text}");
        assert!(!valid(&text), "the schema takes it: {text}");
    }
}

#[test]
fn every_example_is_taken() {
    for (keys, key) in all().into_iter().filter(|(_, key)| key.example.contains('=')) {
        assert!(key.example.starts_with(&format!("{} = ", key.name)), "{}", key.example);
        // The names of the tunnels that the world above has.
        take_file(&file(keys, key, key.example));
    }
}

#[test]
fn what_holds_without_a_key_is_its_default() {
    let mut defaults = 0;
    for (keys, key) in all() {
        let Some(default) = key.default else { continue };
        let with = take(&file(keys, key, &format!("{} = {default}", key.name)));
        let without = take(&file(keys, key, ""));
        assert_eq!(with.config, without.config, "{}", key.name);
        defaults += 1;
    }
    assert!(defaults >= 12, "{defaults}");
}

#[test]
fn the_words_of_a_choice_are_those_that_the_parser_takes() {
    for (keys, key) in all() {
        let Kind::Choice(words) = key.kind else { continue };
        let error = refuse(&file(keys, key, &format!("{} = \"zzzzzzzzzz\"", key.name)));
        let help = only_error(&error).help();
        let said: Vec<&str> = help.split('`').skip(1).step_by(2).collect();
        assert_eq!(said, words.iter().map(|(word, _)| *word).collect::<Vec<_>>(), "{}", key.name);
        for (word, _) in words {
            take(&file(keys, key, &format!("{} = \"{word}\"", key.name)));
        }
    }
}

#[test]
fn every_key_says_what_it_is_for() {
    for (_, key) in all() {
        assert!(key.doc.len() > 8 && key.doc.is_ascii(), "{}: {}", key.name, key.doc);
        if let Some(default) = key.default {
            // As the schema has it.
            assert!(serde_json::from_str::<Value>(default).is_ok(), "{}: {default}", key.name);
        }
    }
}

#[test]
fn the_schema_refuses_what_an_editor_should_underline() {
    for (text, why) in [
        ("datapth = \"both\"", "an unknown key"),
        ("datapath = \"kernle\"", "a word that is none of the choice"),
        ("band = \"20000\"", "a string for a number"),
        ("band = 0", "a number out of range"),
        ("[tunnel.t]\nstart-limit = { burst = 1, intervall = \"1s\" }", "an unknown key in an inline table"),
        ("[tunnel.t]\nstart-limit = { interval = 60 }", "a duration without its unit"),
        ("[tunnel.t]\nup = \"aiccu start\"", "a command line"),
        ("[tunnel.t]\nprobe = { interval = \"5s\" }", "a probe without its target"),
        ("[[policy]]\nname = \"p\"\nvia = \"t\"", "a policy without sources"),
        ("[policy]\nname = \"p\"\nvia = \"t\"\nfrom = \"::1\"", "a policy with one bracket"),
    ] {
        assert!(!valid(text), "{why}: {text}");
    }
}
