//! A streamed answer on its way through: events of the engine that has it, and when that is lost, of another one, without
//! what the client has already.

use serde_json::Value;

use crate::plan::Kind;

/// An event may have so many bytes.
const EVENT_BYTES_MAX: usize = 16 << 20;
/// Longer answers are not kept, and so can not be resumed.
const TEXT_BYTES_MAX: usize = 4 << 20;

/// Why an answer can not go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Broken {
    /// The other engine says something else than the client has.
    Differs,
    /// An event is longer than any.
    TooLong,
}

/// What has been sent of an answer.
#[derive(Debug)]
pub(crate) struct Answer {
    kind: Kind,
    /// The beginning of an event.
    buffer: Vec<u8>,
    /// All text that the client has; empty where it is of no use.
    text: String,
    /// Of that, what the engine that is heard now has said too.
    said: usize,
    id: Option<Value>,
    can_be_resumed: bool,
    is_resumed: bool,
    /// The reason why it ended was sent.
    has_reason: bool,
    /// The last event was sent.
    pub(crate) is_done: bool,
}

impl Answer {
    /// Nothing yet.
    pub(crate) fn new(kind: Kind, can_be_resumed: bool) -> Self {
        Self {
            kind,
            buffer: Vec::new(),
            text: String::new(),
            said: 0,
            id: None,
            can_be_resumed,
            is_resumed: false,
            has_reason: false,
            is_done: false,
        }
    }

    /// Whether another engine may go on.
    pub(crate) fn can_be_resumed(&self) -> bool {
        self.can_be_resumed && !self.is_done
    }

    /// Another engine begins from the start.
    pub(crate) fn resume(&mut self) {
        self.buffer.clear();
        self.said = 0;
        self.is_resumed = true;
    }

    /// Takes in bytes of the engine; what of them is for the client.
    pub(crate) fn take(&mut self, bytes: &[u8]) -> Result<Vec<u8>, Broken> {
        // Where the end of an event could be that was not there before.
        let mut from = self.buffer.len().saturating_sub(1);
        self.buffer.extend_from_slice(bytes);
        let (mut out, mut start) = (Vec::new(), 0);
        while let Some(place) = self.buffer[from..].windows(2).position(|pair| pair == b"\n\n") {
            let end = from + place + 2;
            let event = self.buffer[start..end].to_vec();
            self.event(&event, &mut out)?;
            (start, from) = (end, end);
        }
        self.buffer.drain(..start);
        if self.buffer.len() > EVENT_BYTES_MAX { Err(Broken::TooLong) } else { Ok(out) }
    }

    fn event(&mut self, event: &[u8], out: &mut Vec<u8>) -> Result<(), Broken> {
        let data = event.strip_prefix(b"data:").map(<[u8]>::trim_ascii);
        if data == Some(b"[DONE]") {
            self.is_done = true;
            if self.is_behind() {
                return Err(Broken::Differs);
            }
            out.extend_from_slice(event);
            return Ok(());
        }
        if !self.can_be_resumed && !self.is_resumed {
            out.extend_from_slice(event);
            return Ok(());
        }
        let Some(mut value) = data.and_then(|data| serde_json::from_slice::<Value>(data).ok()) else {
            // A comment, to keep the connection open.
            out.extend_from_slice(event);
            return Ok(());
        };
        let Some(said) = Said::of(self.kind, &value) else {
            self.can_be_resumed = false;
            if self.is_behind() {
                return Err(Broken::Differs);
            }
            return self.forward(event, value, out);
        };
        if !self.is_resumed {
            self.id = self.id.take().or_else(|| value.get("id").cloned());
            self.add(&said.text);
            self.has_reason |= said.has_reason;
            out.extend_from_slice(event);
            return Ok(());
        }
        let missing = &self.text[self.said..];
        let new = match (missing.strip_prefix(said.text.as_str()), said.text.strip_prefix(missing)) {
            (Some(_), None) => {
                // The client has more than that.
                self.said += said.text.len();
                return if said.has_reason { Err(Broken::Differs) } else { Ok(()) };
            }
            (_, Some(new)) => new.to_owned(),
            (None, None) => return Err(Broken::Differs),
        };
        if self.has_reason && !said.is_empty {
            // The client has it all; what is left are counts.
            self.said = self.text.len();
            return if new.is_empty() { Ok(()) } else { Err(Broken::Differs) };
        }
        self.add(&new);
        self.said = self.text.len();
        self.has_reason |= said.has_reason;
        if new.is_empty() && !said.has_reason && !said.is_empty {
            return Ok(());
        }
        if !said.is_empty {
            said.replace(self.kind, &mut value, new);
        }
        self.forward(event, value, out)
    }

    /// Whether the engine has not yet said all that the client has.
    fn is_behind(&self) -> bool {
        self.is_resumed && self.said < self.text.len()
    }

    fn add(&mut self, text: &str) {
        self.text.push_str(text);
        self.can_be_resumed &= self.text.len() <= TEXT_BYTES_MAX;
    }

    /// As it came, or under the name that the answer had at first.
    fn forward(&mut self, event: &[u8], mut value: Value, out: &mut Vec<u8>) -> Result<(), Broken> {
        match (&self.id, value.get_mut("id")) {
            (Some(first), Some(id)) if self.is_resumed => *id = first.clone(),
            _ if self.is_resumed => {}
            _ => {
                out.extend_from_slice(event);
                return Ok(());
            }
        }
        out.extend_from_slice(format!("data: {value}\n\n").as_bytes());
        Ok(())
    }
}

/// What an event says.
struct Said {
    text: String,
    has_reason: bool,
    /// It has no choice: counts of tokens.
    is_empty: bool,
}

impl Said {
    /// Of an event; `None` if it says more than a text.
    fn of(kind: Kind, value: &Value) -> Option<Self> {
        let choices = value.get("choices")?.as_array()?;
        let [choice] = choices.as_slice() else {
            return choices.is_empty().then(|| Self { text: String::new(), has_reason: false, is_empty: true });
        };
        let text = match kind {
            Kind::Completion => choice.get("text"),
            Kind::Chat => {
                let delta = choice.get("delta")?.as_object()?;
                let is_text = |(name, value): (&String, &Value)| {
                    matches!(name.as_str(), "role" | "content")
                        || value.is_null()
                        || value.as_array().is_some_and(Vec::is_empty)
                };
                if !delta.iter().all(is_text) {
                    return None;
                }
                delta.get("content")
            }
        };
        let text = match text {
            None | Some(Value::Null) => String::new(),
            Some(text) => text.as_str()?.to_owned(),
        };
        let has_reason = choice.get("finish_reason").is_some_and(|reason| !reason.is_null());
        Some(Self { text, has_reason, is_empty: false })
    }

    /// Puts another text into the event.
    fn replace(&self, kind: Kind, value: &mut Value, text: String) {
        let choice = match kind {
            Kind::Completion => value.pointer_mut("/choices/0"),
            Kind::Chat => value.pointer_mut("/choices/0/delta"),
        };
        let name = if kind == Kind::Chat { "content" } else { "text" };
        if let Some(Value::Object(choice)) = choice {
            choice.insert(name.into(), Value::String(text));
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn event(text: &str, reason: Option<&str>, id: &str) -> String {
        let value = json!({"id": id, "choices": [{"index": 0, "text": text, "finish_reason": reason}]});
        format!("data: {value}\n\n")
    }

    fn chat(delta: &Value, reason: Option<&str>) -> String {
        format!("data: {}\n\n", json!({"id": "c", "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}))
    }

    /// The text that a client puts together, and how often it was told a reason and the end.
    fn heard(bytes: &[u8]) -> (String, usize, usize) {
        let (mut text, mut reasons, mut ends) = (String::new(), 0, 0);
        for line in std::str::from_utf8(bytes).expect("text").lines().filter(|line| !line.is_empty()) {
            let data = line.strip_prefix("data: ").expect("an event");
            if data == "[DONE]" {
                ends += 1;
                continue;
            }
            let value: Value = serde_json::from_str(data).expect("JSON");
            let choice = &value["choices"][0];
            text += choice["text"].as_str().or(choice["delta"]["content"].as_str()).unwrap_or_default();
            reasons += usize::from(!choice["finish_reason"].is_null());
        }
        (text, reasons, ends)
    }

    #[test]
    fn whatever_was_sent_and_however_it_is_cut_the_resumed_answer_is_whole() {
        let pieces = ["The ", "quick", " br\u{f6}wn", "", " fox", " jumps."];
        let whole = pieces.concat();
        // The first engine is lost after so many bytes; the second one has other pieces, of so many characters each.
        let mut first: String = pieces.iter().map(|piece| event(piece, None, "one")).collect();
        first += &(event("", Some("stop"), "one") + "data: [DONE]\n\n");
        for lost_after in 0..first.len() - 1 {
            for size in 1..8 {
                let mut answer = Answer::new(Kind::Completion, true);
                let mut out = answer.take(&first.as_bytes()[..lost_after]).expect("goes on");
                assert!(answer.can_be_resumed());
                answer.resume();
                let letters: Vec<char> = whole.chars().collect();
                let mut second: String =
                    letters.chunks(size).map(|piece| event(&String::from_iter(piece), None, "two")).collect();
                second += &(event("", Some("stop"), "two") + "data: [DONE]\n\n");
                for part in second.as_bytes().chunks(7) {
                    out.extend(answer.take(part).expect("goes on"));
                }
                assert_eq!(heard(&out), (whole.clone(), 1, 1), "{lost_after} bytes, pieces of {size}");
                assert!(answer.is_done);
                let out = String::from_utf8(out).expect("text");
                assert!(!(out.contains("one") && out.contains("two")), "one name for the whole answer: {out}");
            }
        }
    }

    #[test]
    fn another_text_breaks_the_answer_off() {
        for (second, is_good) in [("Hello world", true), ("Hullo world", false), ("Hel", false)] {
            let mut answer = Answer::new(Kind::Completion, true);
            answer.take(event("Hello", None, "a").as_bytes()).expect("goes on");
            answer.resume();
            let all = event(second, Some("stop"), "b") + "data: [DONE]\n\n";
            assert_eq!(answer.take(all.as_bytes()).is_ok(), is_good, "{second}");
        }
    }

    #[test]
    fn a_shorter_answer_than_the_client_has_is_no_good_end() {
        let mut answer = Answer::new(Kind::Completion, true);
        answer.take(event("Hello", None, "a").as_bytes()).expect("goes on");
        answer.resume();
        assert_eq!(answer.take(b"data: [DONE]\n\n"), Err(Broken::Differs));
    }

    #[test]
    fn a_chat_has_its_role_once_and_its_counts() {
        let role = chat(&json!({"role": "assistant", "content": ""}), None);
        let counts = "data: {\"id\":\"c\",\"choices\":[],\"usage\":{\"total_tokens\":9}}\n\n";
        let mut answer = Answer::new(Kind::Chat, true);
        let mut out = answer.take((role.clone() + &chat(&json!({"content": "Hi"}), None)).as_bytes()).expect("goes on");
        answer.resume();
        let second = role + &chat(&json!({"content": "Hi you"}), Some("stop")) + counts + "data: [DONE]\n\n";
        out.extend(answer.take(second.as_bytes()).expect("goes on"));
        assert_eq!(heard(&out), ("Hi you".into(), 1, 1));
        let text = String::from_utf8(out).expect("text");
        assert_eq!(text.matches("assistant").count(), 1);
        assert_eq!(text.matches("total_tokens").count(), 1);
    }

    #[test]
    fn calls_of_tools_are_passed_on_and_not_resumed() {
        let mut answer = Answer::new(Kind::Chat, true);
        let call = chat(&json!({"tool_calls": [{"index": 0, "function": {"name": "f"}}]}), None);
        assert_eq!(answer.take(call.as_bytes()).expect("goes on"), call.as_bytes());
        assert!(!answer.can_be_resumed());
    }

    #[test]
    fn what_is_not_to_be_resumed_is_passed_on_untouched() {
        let mut answer = Answer::new(Kind::Chat, false);
        for part in ["data: {not", " json\n\n: comment\n\n", "data: [DONE]\n\n"] {
            answer.take(part.as_bytes()).expect("goes on");
        }
        assert!(answer.is_done);
    }

    #[test]
    fn an_event_without_an_end_is_refused() {
        let mut answer = Answer::new(Kind::Chat, true);
        let part = vec![b'a'; 1 << 20];
        let broken = (0..20).find_map(|_| answer.take(&part).err());
        assert_eq!(broken, Some(Broken::TooLong));
    }
}
