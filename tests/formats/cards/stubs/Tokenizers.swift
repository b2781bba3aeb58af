// Signatures of swift-transformers 1.3.3, product Tokenizers, for what cards call.
import Foundation

public typealias Message = [String: any Sendable]

public protocol Tokenizer: Sendable {
    func encode(text: String) -> [Int]
    func decode(tokens: [Int], skipSpecialTokens: Bool) -> String
    func applyChatTemplate(messages: [Message]) throws -> [Int]
}

public extension Tokenizer {
    func decode(tokens: [Int]) -> String { "" }
}

public enum AutoTokenizer {
    public static func from(modelFolder: URL, strict: Bool = true) async throws -> Tokenizer {
        fatalError("a stub")
    }
}
