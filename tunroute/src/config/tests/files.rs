//! Prefixes in files of their own.

use std::{fmt::Write as _, fs, path::Path};

use ipnet::IpNet;

use super::{Loaded, valid};

/// Loads a configuration whose policy has these lines, beside a file `list` with this content.
fn load(lines: &str, list: &[u8]) -> Result<Vec<IpNet>, Vec<(String, String)>> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("tunroute.toml");
    let text = format!("[tunnel.t]\n[[policy]]\nname = \"p\"\nvia = \"t\"\n{lines}\n");
    assert_eq!(valid(&text), !lines.is_empty(), "the schema says otherwise: {text}");
    fs::write(&path, text).unwrap();
    fs::write(directory.path().join("list"), list).unwrap();
    fs::create_dir(directory.path().join("directory")).unwrap();
    match Loaded::load(&path) {
        Ok(loaded) => Ok(loaded.config.policies[0].from.clone()),
        Err(error) => {
            let place = |text: &str| text.replace(&format!("{}/", directory.path().display()), "");
            let problems = error.problems().iter();
            Err(problems.map(|problem| (place(problem.message()), problem.help().to_owned())).collect())
        }
    }
}

#[test]
fn prefixes_come_from_files_too() {
    let prefix = |text: &str| text.parse::<IpNet>().unwrap();
    let list = b"# ours\n\n 192.0.2.0/24 # here\r\n2001:db8::/32\n198.51.100.7";
    let all = [prefix("192.0.2.0/24"), prefix("198.51.100.7/32"), prefix("2001:db8::/32")];
    assert_eq!(load("from-file = \"list\"", list), Ok(all.to_vec()));
    assert_eq!(load("from-file = [\"./list\"]\nfrom = \"10.0.0.0/8\"", list), {
        Ok([prefix("10.0.0.0/8")].into_iter().chain(all).collect())
    });

    let mut many = String::new();
    for number in 0..100_000 {
        writeln!(many, "10.{}.{}.{}/32", number >> 16, number >> 8 & 0xff, number & 0xff).unwrap();
    }
    let read = load("from-file = \"list\"", many.as_bytes()).unwrap();
    assert_eq!((read.len(), read[99_999]), (100_000, prefix("10.1.134.159/32")));
}

#[test]
fn what_is_wrong_is_told_with_file_and_line() {
    for (lines, list, expected) in [
        (
            "from-file = \"list\"",
            "10.0.0.0/8\n10.0.0.1/8",
            &[("list:2: `10.0.0.1/8` has bits set", "\"10.0.0.0/8\"")][..],
        ),
        (
            "from-file = \"list\"",
            "a\n\n127.0.0.1",
            &[("list:1: `a` is not an address", "write an"), ("list:3: ", "remove")],
        ),
        ("from-file = \"list\"", "0.0.0.0/0", &[("list:1: `0.0.0.0/0` takes every packet", "allow-default")]),
        ("from-file = \"list\"", "\n# none\n", &[("list has no prefixes", "one in each line")]),
        ("from-file = \"list\"", "10.0.0.1\n10.0.0.1/32", &[("the source 10.0.0.1/32 twice", "remove one")]),
        ("from-file = \"list\"\nfrom = \"10.0.0.1\"", "10.0.0.1", &[("the source 10.0.0.1/32 twice", "remove one")]),
        ("from-file = \"nowhere\"", "", &[("nowhere cannot be read", "write the file")]),
        ("from-file = \"directory\"", "", &[("directory is a directory", "name the file in it")]),
        ("from-file = \"/dev/null\"", "", &[("/dev/null is not a regular file", "regular file")]),
        ("from-file = []", "", &[("`from-file` is empty", "prefixes.txt")]),
        ("", "", &[("[[policy]] without `from`", "add it")]),
    ] {
        let problems = load(lines, list.as_bytes()).expect_err(lines);
        assert_eq!(problems.len(), expected.len(), "{lines}: {problems:?}");
        for ((message, help), (expected_message, expected_help)) in problems.iter().zip(expected) {
            assert!(message.contains(expected_message), "{message:?} does not say {expected_message:?}");
            assert!(help.contains(expected_help), "{help:?} does not say {expected_help:?}");
        }
    }
    let problems = load("from-file = \"list\"", b"10.0.0.0/8\n\xff").unwrap_err();
    assert_eq!(problems, [("list:2: not UTF-8".to_owned(), "save the file as UTF-8".to_owned())]);
    assert!(Loaded::load(Path::new("/dev/null")).is_err());
}
