//! Configurations of few words, so that they often say a thing twice, or name what is not there.

use std::{fmt::Write as _, iter};

use arbitrary::Arbitrary;
use ipnet::IpNet;

const TUNNELS: [&str; 4] = ["tun0", "tun1", "wg0", "wg1"];
const PATTERNS: [&str; 8] = ["lan0", "lan0", "lan0", "net0", "tun0", "tun*", "wg*", "w*"];
const ON_DOWN: [&str; 4] = ["unreachable", "blackhole", "prohibit", "next"];

/// The choices; each number is taken for as much of it as there is to choose from.
#[derive(Arbitrary, Debug)]
pub struct FewWords {
    band: Option<u16>,
    ingress: u8,
    uplink: u8,
    /// A bit says whether the tunnel is declared.
    declared: u8,
    tunnel_tables: [Option<u8>; 4],
    policies: Vec<Policy>,
}

#[derive(Arbitrary, Debug)]
struct Policy {
    name: u8,
    table: Option<u8>,
    from: Several,
    via: Several,
    on_down: u8,
    exempt: Vec<u8>,
}

/// At least one choice.
#[derive(Arbitrary, Debug)]
struct Several(u8, Vec<u8>);

impl Several {
    fn choices(&self) -> impl Iterator<Item = &u8> {
        iter::once(&self.0).chain(&self.1)
    }
}

fn one<'a>(words: &[&'a str], choice: u8) -> &'a str {
    words[usize::from(choice) % words.len()]
}

/// A prefix of one of two addresses of either family: many contain one another.
fn prefix(choice: u8) -> String {
    let (address, shortest) = match choice & 3 {
        0 => ("10.0.0.0", 8),
        1 => ("10.128.0.0", 8),
        2 => ("2001:db8::", 32),
        _ => ("2001:db8:8000::", 32),
    };
    let length = shortest + (choice >> 2 & 7);
    IpNet::new(address.parse().expect("an address"), length).expect("a length").trunc().to_string()
}

fn list<'a>(choices: impl IntoIterator<Item = &'a u8>, word: impl Fn(u8) -> String) -> String {
    let quoted: Vec<String> = choices.into_iter().map(|choice| format!("{:?}", word(*choice))).collect();
    format!("[{}]", quoted.join(", "))
}

fn table(choice: Option<u8>) -> String {
    choice.map_or_else(String::new, |choice| format!("table = {}\n", 250 + u16::from(choice % 8)))
}

impl FewWords {
    /// The file.
    pub fn write(&self) -> String {
        let mut text = self.band.map_or_else(String::new, |band| format!("band = {band}\n"));
        let [ingress, uplink] = [self.ingress, self.uplink].map(|choice| one(&PATTERNS, choice));
        let _ = write!(text, "[interfaces]\ningress = [\"{ingress}\"]\nuplink = [\"{uplink}\"]\n");
        for (index, name) in TUNNELS.into_iter().enumerate().filter(|(index, _)| self.declared >> index & 1 != 0) {
            let _ = write!(text, "[tunnel.{name}]\n{}", table(self.tunnel_tables[index]));
        }
        for policy in &self.policies {
            let from = list(policy.from.choices(), prefix);
            let via = list(policy.via.choices(), |choice| one(&TUNNELS, choice).to_owned());
            let exempt = list(&policy.exempt, prefix);
            let (name, on_down) = (policy.name % 16, one(&ON_DOWN, policy.on_down));
            let _ = write!(
                text,
                "[[policy]]\nname = \"p{name}\"\nfrom = {from}\nvia = {via}\nexempt = {exempt}\n\
                 on-down = \"{on_down}\"\n{}",
                table(policy.table)
            );
        }
        text
    }
}
