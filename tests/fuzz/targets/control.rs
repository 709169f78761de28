//! The control protocol: whatever is sent is taken or refused, in one line; and what is taken says the same when it is
//! sent on.
#![no_main]

use std::cell::LazyCell;

use libfuzzer_sys::fuzz_target;
use serde_json::{from_slice, to_vec};
use tokio::runtime::{Builder, Runtime};
use tunroute::control::socket::{self, Answer, MAX_REQUEST, Request};

thread_local! {
    static RUNTIME: LazyCell<Runtime> =
        LazyCell::new(|| Builder::new_current_thread().enable_time().build().expect("a runtime"));
}

/// What the daemon gets to see of a client that sends this, and what the client gets to see.
fn served(sent: &[u8]) -> (Vec<Request>, Vec<u8>) {
    let (calls, mut received) = control::channel();
    let mut answer = Vec::new();
    let daemon = async {
        let mut requests = Vec::new();
        while let Some((request, answer)) = received.recv().await {
            requests.push(request);
            answer.send(Answer::Done).expect("somebody waits for the answer");
        }
        requests
    };
    let both = async { tokio::join!(control::serve(sent, &mut answer, calls), daemon) };
    let (served, requests) = RUNTIME.with(|runtime| runtime.block_on(both));
    served.expect("memory can be read and written");
    (requests, answer)
}

fn check_served(sent: &[u8]) {
    let (requests, answer) = served(sent);
    let line = sent.split_inclusive(|byte| *byte == b'\n').next().unwrap_or_default();
    let line = &line[..line.len().min(MAX_REQUEST as usize)];
    assert_eq!(answer.iter().position(|byte| *byte == b'\n'), Some(answer.len() - 1), "an answer is a line");
    let answer = from_slice::<Answer>(&answer).expect("an answer");
    match from_slice::<Request>(line) {
        Ok(request) => {
            assert_eq!(requests, [request], "the first line is the request");
            assert!(matches!(answer, Answer::Done), "{answer:?}");
        }
        Err(_) => {
            assert_eq!(requests, [], "this is no request, or too long");
            assert!(matches!(answer, Answer::Failed(_)), "{answer:?}");
        }
    }
}

fuzz_target!(|input: &[u8]| {
    // Nobody writes so many bytes: a digit stands for 16 KiB of spaces each.
    let (line, padding) = match input {
        [digit @ b'0'..=b'9', rest @ ..] => (rest, usize::from(digit - b'0') << 14),
        _ => (input, 0),
    };
    check_served(&[&b" ".repeat(padding), line].concat());

    if let Ok(request) = from_slice::<Request>(line) {
        let sent = to_vec(&request).expect("a request can be sent");
        assert!(!sent.contains(&b'\n'), "a request is a line");
        assert_eq!(from_slice::<Request>(&sent).expect("a request that was sent is one"), request);
    }
    if let Ok(answer) = from_slice::<Answer>(line) {
        let sent = to_vec(&answer).expect("an answer can be sent");
        assert!(!sent.contains(&b'\n'), "an answer is a line");
        let received = from_slice::<Answer>(&sent).expect("an answer that was sent is one");
        assert_eq!(to_vec(&received).expect("it can be sent on"), sent);
        if let (Answer::Status(sent), Answer::Status(received)) = (&answer, &received) {
            assert_eq!(sent.render(), received.render(), "a person reads the same");
        }
    }
});
