//! What `cargo xtask lint` checks in documents: the README's length, links, and generated pages.

use std::{
    collections::BTreeSet,
    fs,
    path::{Component, Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{
    build,
    command::{output_of, workspace},
};

/// Maximum length of the README, in lines.
const README_LINES: usize = 150;
/// Pages that `tunroute/examples/documents.rs` generates, by their places in the workspace.
const GENERATED: [&str; 1] = ["docs/configuration.md"];

/// Checks README, links and generated pages; with `fix`, writes the generated pages anew instead.
pub fn check(fix: bool) -> Result<()> {
    let root = workspace()?;
    let lines = read(&root.join("README.md"))?.lines().count();
    ensure!(lines <= README_LINES, "README.md has {lines} lines, {README_LINES} are the most: move something to docs/");
    generated(&root, fix)?;
    let files = output_of(Command::new("git").args(["ls-files", "-z", "*.md"]).current_dir(&root))?;
    let pages: BTreeSet<PathBuf> = files.split_terminator('\0').map(PathBuf::from).collect();
    let mut broken = Vec::new();
    for page in &pages {
        let text = read(&root.join(page))?;
        for link in links(&text) {
            if let Err(why) = follow(&root, page, link) {
                broken.push(format!("{}: {link}: {why}", page.display()));
            }
        }
    }
    ensure!(broken.is_empty(), "links lead nowhere:\n{}", broken.join("\n"));
    Ok(())
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

/// Compares the generated pages with their sources, or writes them.
fn generated(root: &Path, fix: bool) -> Result<()> {
    let fresh = root.join("target/documents");
    build::documents(&fresh)?;
    for page in GENERATED {
        let name = Path::new(page).file_name().context("a page has a name")?;
        let (is, should) = (root.join(page), read(&fresh.join(name))?);
        if fix {
            fs::write(&is, should).with_context(|| format!("cannot write {}", is.display()))?;
        } else if read(&is)? != should {
            bail!("{page} is older than what it is generated from: run `cargo xtask lint --fix`");
        }
    }
    Ok(())
}

/// The targets of a page's links and pictures, except those in code blocks and those to other sites.
fn links(text: &str) -> Vec<&str> {
    let mut found = Vec::new();
    for (number, part) in text.split("\n```").enumerate() {
        // Every second part is a code block.
        if number % 2 == 0 {
            let targets = part.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(target, _)| target);
            found.extend(targets.filter(|target| !target.contains("://")));
        }
    }
    found
}

/// Finds what a link on a page leads to: a file or folder of the workspace, and in a page the heading behind `#`.
fn follow(root: &Path, page: &Path, link: &str) -> Result<(), String> {
    let (file, heading) = link.split_once('#').map_or((link, None), |(file, heading)| (file, Some(heading)));
    let target = if file.is_empty() {
        page.to_owned()
    } else {
        normal(&page.parent().unwrap_or(Path::new("")).join(file)).ok_or("it leaves the workspace")?
    };
    let path = root.join(&target);
    if !path.exists() {
        return Err(format!("there is no {}", target.display()));
    }
    let Some(heading) = heading else { return Ok(()) };
    let text = fs::read_to_string(&path).map_err(|error| error.to_string())?;
    let known = text.lines().filter(|line| line.starts_with('#')).any(|line| anchor(line) == heading);
    if known { Ok(()) } else { Err(format!("{} has no such heading", target.display())) }
}

/// A path without `.` and `..`; `None` if it leads out of the workspace.
fn normal(path: &Path) -> Option<PathBuf> {
    let mut normal = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => normal.push(name),
            Component::CurDir => {}
            Component::ParentDir => {
                if !normal.pop() {
                    return None;
                }
            }
            Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    Some(normal)
}

/// The anchor that GitHub gives a heading.
fn anchor(heading: &str) -> String {
    let text = heading.trim_start_matches('#').trim().to_lowercase();
    let kept = text.chars().filter(|letter| letter.is_alphanumeric() || matches!(letter, ' ' | '-' | '_'));
    kept.map(|letter| if letter == ' ' { '-' } else { letter }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_links_outside_of_code() {
        let text = "[a](b.md) ![p](c.svg)\n[far](https://example.org)\n```\n[code](d.md)\n```\n[e](f.md#g)";
        assert_eq!(links(text), ["b.md", "c.svg", "f.md#g"]);
    }

    #[test]
    fn names_headings_as_the_web_site_does() {
        for (heading, expected) in [
            ("## When the kernel decides", "when-the-kernel-decides"),
            ("## `datapath = \"ebpf\"`", "datapath--ebpf"),
            ("# MSS", "mss"),
        ] {
            assert_eq!(anchor(heading), expected);
        }
    }

    #[test]
    fn paths_stay_inside() {
        assert_eq!(normal(Path::new("docs/../README.md")), Some("README.md".into()));
        assert_eq!(normal(Path::new("docs/../../x")), None);
        assert_eq!(normal(Path::new("/etc/passwd")), None);
    }
}
