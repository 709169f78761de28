//! The control protocol: whatever is sent is taken or refused; and what is taken says the same when it is sent on.
#![no_main]

use libfuzzer_sys::fuzz_target;
use serde_json::{from_slice, to_vec};
use tunroute::control::{Answer, Request};

fuzz_target!(|line: &[u8]| {
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
